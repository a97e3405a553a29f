package trust

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
)

// maxOrder is how long what an ACME server says of an order may be, in bytes.
const maxOrder = 1 << 20

// orders says where an order is when the ACME server does not: the client behind autocert asks for that in the
// answer to a finalization too, where RFC 8555 (7.4) does not demand it, and gives up without.
type orders struct {
	next http.RoundTripper

	mu sync.Mutex
	at map[string]string // mu guards it: the order's URL by that of its finalization
}

func newOrders(next http.RoundTripper) *orders {
	return &orders{next: next, at: map[string]string{}}
}

// RoundTrip implements http.RoundTripper.
func (o *orders) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := o.next.RoundTrip(req)
	if err != nil || req.Method != http.MethodPost || resp.StatusCode/100 != 2 {
		return resp, err
	}
	o.mu.Lock()
	order := o.at[req.URL.String()]
	o.mu.Unlock()
	at := resp.Header.Get("Location")
	switch {
	case at == "" && order != "":
		resp.Header.Set("Location", order)
	case at != "" && resp.StatusCode == http.StatusCreated:
		text, err := io.ReadAll(io.LimitReader(resp.Body, maxOrder))
		_ = resp.Body.Close()
		if err != nil {
			return nil, fmt.Errorf("read what the ACME server says of an order: %w", err)
		}
		resp.Body = io.NopCloser(bytes.NewReader(text))
		var said struct {
			Finalize string `json:"finalize"`
		}
		if json.Unmarshal(text, &said) == nil && said.Finalize != "" {
			o.mu.Lock()
			clear(o.at) // one domain has one order at a time
			o.at[said.Finalize] = at
			o.mu.Unlock()
		}
	}
	return resp, nil
}
