package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor/k8s"
)

// maxKnownPods bounds the pods that are kept; Kubernetes itself supports 110 on a node.
const maxKnownPods = 4096

// errNoPod says that whoever could be asked knows no such pod.
var errNoPod = errors.New("neither the API server nor the kubelet knows the pod")

// errNobody says that there was nobody to ask.
var errNobody = errors.New("neither the API server nor the kubelet answers")

// pods are those of this node. The API server tells of every change; where it does not, the kubelet is asked,
// by one at a time for all who want to know.
type pods struct {
	log     logrus.FieldLogger
	kubelet *rest // nil: there is none
	health  *health

	mu     sync.Mutex // guards all below
	byUID  map[string]*pod
	static map[string]string // by the UID the kubelet knows a static pod by, that of its mirror
	// gone are pods that the API server said were deleted: the kubelet may tell of one a moment longer.
	gone   map[string]struct{}
	live   bool          // the API server tells of changes
	moved  chan struct{} // closed, and replaced, at every change
	asking *asking
	// changed are told of each pod whose selectors changed.
	changed func(uids ...string)
}

// asking is a list of the kubelet's under way.
type asking struct {
	done chan struct{}
	err  error
}

func newPods(log logrus.FieldLogger, kubelet *rest, h *health) *pods {
	return &pods{
		log: log, kubelet: kubelet, health: h, byUID: map[string]*pod{}, static: map[string]string{}, gone: map[string]struct{}{},
		moved: make(chan struct{}), changed: func(...string) {},
	}
}

// get returns a pod that is known already, by the UID that the kubelet knows it by.
func (s *pods) get(uid string) *pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lookup(uid)
}

// lookup is get. The caller holds mu.
func (s *pods) lookup(uid string) *pod {
	if p := s.byUID[uid]; p != nil {
		return p
	}
	if mirror, ok := s.static[uid]; ok {
		return s.byUID[mirror]
	}
	return nil
}

// find returns a pod, asking the kubelet if it is not known. It returns errNoPod if nobody knows it and
// errNobody if nobody could be asked.
func (s *pods) find(ctx context.Context, uid string, fits func(*pod) bool) (*pod, error) {
	for range 2 { // a list that began before the pod was there says nothing
		s.mu.Lock()
		p, live := s.lookup(uid), s.live
		s.mu.Unlock()
		if p != nil && fits(p) {
			return p, nil
		}
		err := errNobody
		if s.kubelet != nil {
			err = s.ask(ctx)
		}
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil && live:
			return s.wait(ctx, uid, fits)
		case err != nil:
			return nil, fmt.Errorf("%w: %w", errNobody, err)
		}
	}
	if p := s.get(uid); p != nil && fits(p) {
		return p, nil
	}
	return nil, errNoPod
}

// wait waits for the API server to tell of a pod.
func (s *pods) wait(ctx context.Context, uid string, fits func(*pod) bool) (*pod, error) {
	for {
		s.mu.Lock()
		p, moved := s.lookup(uid), s.moved
		s.mu.Unlock()
		if p != nil && fits(p) {
			return p, nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", errNoPod, ctx.Err())
		}
	}
}

// pause waits for any change, but not for long.
func (s *pods) pause(ctx context.Context, atMost time.Duration) error {
	s.mu.Lock()
	moved := s.moved
	s.mu.Unlock()
	wait := time.NewTimer(atMost)
	defer wait.Stop()
	select {
	case <-moved:
	case <-wait.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// ask lists the kubelet's pods once, for all who ask meanwhile.
func (s *pods) ask(ctx context.Context) error {
	s.mu.Lock()
	a := s.asking
	if a == nil {
		if s.health.avoid() {
			s.mu.Unlock()
			return errors.New("the kubelet did not answer a moment ago")
		}
		a = &asking{done: make(chan struct{})}
		s.asking = a
		s.mu.Unlock()
		// It is asked for others too: one who leaves must not end it for them.
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerWithin/2)
		a.err = s.fetch(within)
		cancel()
		s.mu.Lock()
		s.asking = nil
		s.mu.Unlock()
		s.health.observe(a.err)
		close(a.done)
		return a.err
	}
	s.mu.Unlock()
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *pods) fetch(ctx context.Context) error {
	body, err := s.kubelet.get(ctx, "/pods", nil, "application/json")
	if err != nil {
		return err
	}
	defer body.Close()
	item, done := s.collect(true)
	if _, _, err := readList(body, item); err != nil {
		return fmt.Errorf("read pods of the kubelet: %w", err)
	}
	done()
	return nil
}

// replace begins a full list of the API server's.
func (s *pods) replace() (func(json.RawMessage) error, func()) { return s.collect(false) }

// collect gathers a full list. The kubelet's adds what the API server has not told of (a static pod whose
// mirror is not there), and takes its place while it tells nothing.
func (s *pods) collect(ofKubelet bool) (func(json.RawMessage) error, func()) {
	fresh := map[string]*pod{}
	item := func(object json.RawMessage) error {
		p, err := decodePod(object)
		if err != nil {
			s.log.WithError(err).Warn("pod is left out")
			return nil
		}
		if len(fresh) >= maxKnownPods {
			return fmt.Errorf("more than %d pods on one node", maxKnownPods)
		}
		fresh[p.uid] = p
		return nil
	}
	return item, func() {
		s.mu.Lock()
		var changed []string
		if !ofKubelet {
			s.gone = map[string]struct{}{}
		}
		for uid := range s.gone {
			delete(fresh, uid)
		}
		for uid, p := range s.byUID {
			now, still := fresh[uid]
			switch {
			case ofKubelet && s.live: // what the API server says is newer
				fresh[uid] = p
			case !still:
				changed = append(changed, uid, p.mirror)
			case !now.sameAs(p):
				changed = append(changed, uid, p.mirror)
			}
		}
		for uid, p := range fresh {
			if s.byUID[uid] == nil {
				changed = append(changed, uid, p.mirror)
			}
		}
		s.byUID = fresh
		s.index()
		s.tell(changed)
	}
}

// index makes static anew. The caller holds mu.
func (s *pods) index() {
	s.static = map[string]string{}
	for uid, p := range s.byUID {
		if p.mirror != "" {
			s.static[p.mirror] = uid
		}
	}
}

// tell wakes who waits and unlocks mu.
func (s *pods) tell(changed []string) {
	close(s.moved)
	s.moved = make(chan struct{})
	tell := s.changed
	s.mu.Unlock()
	if len(changed) > 0 {
		tell(changed...)
	}
}

// event takes one change from the API server.
func (s *pods) event(kind string, object json.RawMessage) error {
	p, err := decodePod(object)
	if err != nil {
		s.log.WithError(err).Warn("change of pod is left out")
		return nil
	}
	s.mu.Lock()
	before := s.byUID[p.uid]
	var changed []string
	switch {
	case kind == "DELETED":
		delete(s.byUID, p.uid)
		if len(s.gone) < maxKnownPods {
			s.gone[p.uid] = struct{}{}
		}
		changed = []string{p.uid, p.mirror}
	case before == nil && len(s.byUID) >= maxKnownPods:
		s.mu.Unlock()
		s.log.WithField("limit", maxKnownPods).Warn("more pods on one node than are kept; one is left out")
		return nil
	default:
		delete(s.gone, p.uid)
		s.byUID[p.uid] = p
		if before == nil || !before.sameAs(p) {
			changed = []string{p.uid, p.mirror}
		}
	}
	if p.mirror != "" || before != nil && before.mirror != "" {
		s.index()
	}
	s.tell(changed)
	return nil
}

func (s *pods) setLive(live bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live = live
}

// isLive reports whether changes arrive by themselves.
func (s *pods) isLive() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live
}

func decodePod(object json.RawMessage) (*pod, error) {
	var w wirePod
	if err := json.Unmarshal(object, &w); err != nil {
		return nil, fmt.Errorf("read pod: %w", err)
	}
	return parsePod(&w)
}

// nodeName returns the node's name, empty if it is not told.
func nodeName(c *k8s.Config) string {
	if c.NodeName != "" {
		return c.NodeName
	}
	return os.Getenv(firstOf(c.NodeNameEnv, k8s.DefaultNodeNameEnv))
}

// openKubelet returns nil if the kubelet is not to be asked.
func openKubelet(c *k8s.Config, log logrus.FieldLogger) (*rest, error) {
	if c.DisableKubelet {
		return nil, nil
	}
	node := nodeName(c)
	host := firstOf(c.KubeletAddress, node, "127.0.0.1")
	if strings.ContainsAny(host, "/@?# ") {
		return nil, fmt.Errorf("kubelet_address: %q is no host name or address", host)
	}
	for name, port := range map[string]int{"kubelet_secure_port": c.KubeletSecurePort, "kubelet_read_only_port": c.KubeletReadOnlyPort} {
		if port < 0 || port > 65535 {
			return nil, fmt.Errorf("%s: %d is no port", name, port)
		}
	}
	if c.KubeletReadOnlyPort != 0 {
		if c.KubeletSecurePort != 0 {
			return nil, errors.New("set kubelet_secure_port or kubelet_read_only_port, not both")
		}
		log.Warn("the kubelet is asked over its read-only port, where anybody on the network may answer in its place")
		return &rest{name: "kubelet", base: "http://" + net.JoinHostPort(host, strconv.Itoa(c.KubeletReadOnlyPort))}, nil
	}
	port := c.KubeletSecurePort
	if port == 0 {
		port = k8s.DefaultSecurePort
	}
	r := &rest{
		name: "kubelet", base: "https://" + net.JoinHostPort(host, strconv.Itoa(port)), serverName: node,
		caPath: firstOf(c.KubeletCAPath, k8s.DefaultCAPath), unverified: c.SkipKubeletVerification,
	}
	if r.unverified {
		log.Warn("skip_kubelet_verification: whoever answers in the kubelet's place is believed, and gets the agent's token")
	}
	return r, r.authenticate(c)
}

// openAPIServer returns nil if there is none to be asked.
func openAPIServer(c *k8s.Config) (*rest, error) {
	base := strings.TrimSuffix(c.APIServer, "/")
	switch base {
	case k8s.None:
		return nil, nil
	case "":
		host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
		if host == "" || port == "" {
			return nil, nil
		}
		base = "https://" + net.JoinHostPort(host, port)
	}
	if u, err := url.Parse(base); err != nil || u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.User != nil {
		return nil, fmt.Errorf("api_server: %q is no https:// URL, nor %q", c.APIServer, k8s.None)
	}
	r := &rest{name: "API server", base: base, caPath: firstOf(c.APIServerCAPath, k8s.DefaultCAPath)}
	return r, r.authenticate(c)
}

// authenticate chooses what the agent shows.
func (r *rest) authenticate(c *k8s.Config) error {
	switch {
	case (c.CertificatePath == "") != (c.PrivateKeyPath == ""):
		return errors.New("certificate_path and private_key_path must be set together")
	case c.UseAnonymousAuthentication && (c.CertificatePath != "" || c.TokenPath != ""):
		return errors.New("use_anonymous_authentication excludes token_path and certificate_path")
	case c.CertificatePath != "" && c.TokenPath != "":
		return errors.New("set token_path or certificate_path, not both")
	case c.UseAnonymousAuthentication:
	case c.CertificatePath != "":
		r.certPath, r.keyPath = c.CertificatePath, c.PrivateKeyPath
	default:
		r.tokenPath = firstOf(c.TokenPath, k8s.DefaultTokenPath)
	}
	return nil
}
