// Package dns is a DNS server on the loopback interface that tells what it is told to: addresses by name,
// and another one each time if a test wants to see what a rebound name does.
package dns

import (
	"net"
	"net/netip"
	"strings"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
)

// Server is a running server.
type Server struct {
	conn net.PacketConn
	done chan struct{}

	mu    sync.Mutex // guards what follows
	names map[string][]netip.Addr
	asked map[string]int
}

// Start starts a server that knows the names; Close ends it. Of several addresses each answer has one, the
// next each time and the last from then on.
func Start(names map[string][]netip.Addr) (*Server, error) {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &Server{conn: conn, done: make(chan struct{}), names: names, asked: map[string]int{}}
	go s.serve()
	return s, nil
}

// Address is where it listens.
func (s *Server) Address() string { return s.conn.LocalAddr().String() }

// Close ends it.
func (s *Server) Close() {
	_ = s.conn.Close()
	<-s.done
}

func (s *Server) serve() {
	defer close(s.done)
	buffer := make([]byte, 4096)
	for {
		n, from, err := s.conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		if answer, ok := s.answer(buffer[:n]); ok {
			_, _ = s.conn.WriteTo(answer, from)
		}
	}
}

func (s *Server) answer(packet []byte) ([]byte, bool) {
	var query dnsmessage.Message
	if query.Unpack(packet) != nil || len(query.Questions) != 1 {
		return nil, false
	}
	q := query.Questions[0]
	reply := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: query.ID, Response: true, Authoritative: true, RecursionAvailable: true},
		Questions: query.Questions,
	}
	name := strings.TrimSuffix(strings.ToLower(q.Name.String()), ".")
	s.mu.Lock()
	addresses, known := s.names[name]
	var at netip.Addr
	if known && q.Type == dnsmessage.TypeA {
		at = addresses[min(s.asked[name], len(addresses)-1)]
		s.asked[name]++
	}
	s.mu.Unlock()
	switch {
	case !known:
		reply.RCode = dnsmessage.RCodeNameError
	case at.Is4():
		reply.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
			Body:   &dnsmessage.AResource{A: at.As4()},
		}}
	}
	answer, err := reply.Pack()
	return answer, err == nil
}
