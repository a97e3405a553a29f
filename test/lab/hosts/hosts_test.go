package hosts_test

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/hosts"
)

func TestHosts(t *testing.T) {
	if err := hosts.Available(); err != nil {
		lab.Missing(t, "hosts of their own", err)
	}
	n, err := hosts.New()
	if err != nil {
		lab.Missing(t, "hosts of their own", err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	one, err := n.Host("one")
	must(err)
	two, err := n.Host("two")
	must(err)
	l, err := two.Listen("tcp", ":7000")
	must(err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	dial := func() (net.Conn, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		return one.Dial(ctx, "tcp", two.Addr+":7000")
	}
	talk := func(c net.Conn) error {
		_ = c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	patiently := func(what string, ask func() error) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; {
			err := ask()
			if err == nil {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
	var c net.Conn
	connected := func() (err error) {
		if c, err = dial(); err != nil {
			return err
		}
		return talk(c)
	}
	patiently("connect", connected)
	t.Run("another host is another machine", func(t *testing.T) {
		// Whoever has that address outside, or takes every call as some networks do, is not it.
		if c, err := net.DialTimeout("tcp", two.Addr+":7000", 200*time.Millisecond); err == nil {
			defer c.Close()
			if err := talk(c); err == nil {
				t.Error("it is reached from outside")
			}
		}
	})
	t.Run("a link that is cut says nothing", func(t *testing.T) {
		must(two.Cut())
		if err := talk(c); err == nil {
			t.Error("it answers")
		} else if timeout, ok := err.(net.Error); !ok || !timeout.Timeout() { //nolint:errorlint // as net returns it
			t.Errorf("error is %v", err)
		}
		must(two.Mend())
		patiently("connect again", connected)
	})
	t.Run("a link that refuses does so at once", func(t *testing.T) {
		must(two.Refuse())
		patiently("the connection ends", func() error {
			if err := talk(c); err != nil {
				return nil //nolint:nilerr // that is what is waited for
			}
			return context.DeadlineExceeded
		})
		if other, err := dial(); err == nil {
			other.Close()
			t.Error("it connects")
		}
		must(two.Admit())
		patiently("connect again", connected)
	})
	_ = c.Close()
}
