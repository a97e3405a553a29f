package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/assay-id/assay/attestor"
)

// errGone says that the version to go on from is no longer kept: everything must be listed anew.
var errGone = errors.New("version is too old")

// watchFor is about how long one watch lasts before it is opened anew, with the token as it is then.
const watchFor = 5 * time.Minute

// table follows one kind of object at the API server.
type table struct {
	api   *rest
	path  string
	query url.Values // which of them
	// metadata asks for what every object has, without the rest.
	metadata bool
}

// list reads all objects and returns the version they are of.
func (t *table) list(ctx context.Context, item func(json.RawMessage) error) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*answerWithin)
	defer cancel()
	query := t.asked()
	query.Set("limit", "500")
	for {
		body, err := t.api.get(ctx, t.path, query, t.accept("PartialObjectMetadataList"))
		if err != nil {
			return "", err
		}
		version, more, err := readList(body, item)
		_ = body.Close() // read to its end, or of no use
		if err != nil {
			return "", fmt.Errorf("read list of %s: %w", t.path, err)
		}
		if more == "" {
			return version, nil
		}
		query.Set("continue", more)
	}
}

// watch calls opened when the API server has taken the question, and event for every change after a version, until
// the API server ends the stream, and returns the version to go on from.
func (t *table) watch(ctx context.Context, version string, opened func(), event func(kind string, object json.RawMessage) error) (string, error) {
	query := t.asked()
	query.Set("watch", "true")
	query.Set("allowWatchBookmarks", "true")
	query.Set("resourceVersion", version)
	lasts := watchFor + rand.N(watchFor) //nolint:gosec // jitter is no secret
	query.Set("timeoutSeconds", strconv.Itoa(int(lasts.Seconds())))
	ctx, cancel := context.WithTimeout(ctx, lasts+answerWithin)
	defer cancel()
	body, err := t.api.get(ctx, t.path, query, t.accept("PartialObjectMetadata"))
	if err != nil {
		if refused, ok := errors.AsType[*statusError](err); ok && refused.code == http.StatusGone {
			return "", errGone
		}
		return version, err
	}
	defer body.Close()
	opened()
	stream := &io.LimitedReader{R: body}
	d := json.NewDecoder(stream)
	for {
		stream.N = maxObject
		var change struct {
			Type   string
			Object json.RawMessage
		}
		if err := d.Decode(&change); err != nil {
			if errors.Is(err, io.EOF) || ctx.Err() != nil {
				return version, nil // its time was over
			}
			return version, fmt.Errorf("read changes of %s: %w", t.path, err)
		}
		var head struct {
			Code     int
			Message  string
			Metadata struct{ ResourceVersion string }
		}
		if err := json.Unmarshal(change.Object, &head); err != nil {
			return version, fmt.Errorf("read change of %s: %w", t.path, err)
		}
		switch change.Type {
		case "ERROR":
			if head.Code == http.StatusGone {
				return "", errGone
			}
			return version, fmt.Errorf("watch %s: %d %s", t.path, head.Code, head.Message)
		case "ADDED", "MODIFIED", "DELETED":
			if err := event(change.Type, change.Object); err != nil {
				return version, err
			}
		}
		if head.Metadata.ResourceVersion != "" {
			version = head.Metadata.ResourceVersion
		}
	}
}

func (t *table) accept(as string) string {
	if t.metadata {
		return "application/json;as=" + as + ";g=meta.k8s.io;v=v1,application/json"
	}
	return "application/json"
}

// asked is the query to add to.
func (t *table) asked() url.Values {
	query := url.Values{}
	maps.Copy(query, t.query)
	return query
}

// keeper is what a table is kept in.
type keeper struct {
	// replace starts a full list; the function it returns takes each object, and done says that it was all.
	replace func() (item func(json.RawMessage) error, done func())
	event   func(kind string, object json.RawMessage) error
	// live says whether changes arrive.
	live func(bool)
}

// firstPause and maxPause bound the wait before a stream is opened again.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

// keep follows a table until ctx ends.
func (t *table) keep(ctx context.Context, k keeper, seen func(error)) {
	pause, version := firstPause, ""
	for ctx.Err() == nil {
		err := func() error {
			if version == "" {
				item, done := k.replace()
				listed, err := t.list(ctx, item)
				if err != nil {
					return err
				}
				done()
				version = listed
			}
			opened := time.Now()
			// Not before the answer has begun: a connection to who is away can hang for minutes.
			next, err := t.watch(ctx, version, func() { k.live(true); seen(nil) }, k.event)
			version = next
			if err == nil || errors.Is(err, errGone) {
				if time.Since(opened) > time.Second {
					pause = firstPause
				}
				return nil
			}
			return err
		}()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			k.live(false)
			seen(err)
		}
		attestor.Pause(ctx, pause)
		pause = min(2*pause, maxPause)
	}
}
