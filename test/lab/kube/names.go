package kube

import (
	"context"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// names answers the pods' questions for the addresses of services and of the node, in place of CoreDNS, whose
// image cannot be pulled. What it answered once it answers also while the API server is away.
type names struct {
	client kubernetes.Interface
	socket net.PacketConn
	ended  sync.WaitGroup

	mu    sync.Mutex // guards known
	known map[string]string
}

func serveNames(client kubernetes.Interface) (*names, error) {
	socket, err := net.ListenPacket("udp", net.JoinHostPort(NodeIP, "53"))
	if err != nil {
		return nil, err
	}
	n := &names{client: client, socket: socket, known: map[string]string{}}
	n.ended.Go(n.serve)
	return n, nil
}

func (n *names) close() {
	if n == nil {
		return
	}
	_ = n.socket.Close()
	n.ended.Wait()
}

func (n *names) serve() {
	packet := make([]byte, 1500)
	for {
		size, from, err := n.socket.ReadFrom(packet)
		if err != nil {
			return // closed
		}
		question := append([]byte(nil), packet[:size]...)
		n.ended.Go(func() {
			if answer := n.answer(question); answer != nil {
				_, _ = n.socket.WriteTo(answer, from) // who asked asks again
			}
		})
	}
}

func (n *names) answer(packet []byte) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(packet); err != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	m.Response, m.Authoritative, m.RecursionAvailable = true, true, true
	m.Answers, m.Additionals, m.Authorities = nil, nil, nil
	ip := n.find(strings.ToLower(strings.TrimSuffix(q.Name.String(), ".")))
	switch {
	case ip == nil:
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 5},
			Body:   &dnsmessage.AResource{A: [4]byte(ip.To4())},
		}}
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}

// find returns the address of a name, or nil.
func (n *names) find(name string) net.IP {
	if name == NodeName {
		return net.ParseIP(NodeIP)
	}
	parts := strings.Split(name, ".")
	if len(parts) != 5 || strings.Join(parts[2:], ".") != "svc.cluster.local" {
		return nil
	}
	n.mu.Lock()
	ip := n.known[name]
	n.mu.Unlock()
	if ip == "" {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		service, err := n.client.CoreV1().Services(parts[1]).Get(ctx, parts[0], metav1.GetOptions{})
		if err != nil {
			return nil
		}
		ip = service.Spec.ClusterIP
		n.mu.Lock()
		n.known[name] = ip
		n.mu.Unlock()
	}
	return net.ParseIP(ip)
}
