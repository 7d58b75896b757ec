package object_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/object"
)

// link stands before a server, and can lose every connection that is open without telling anybody, as a router that
// forgot them does.
type link struct {
	listener net.Listener
	server   string
	lost     atomic.Int64 // connections opened before this number carry nothing any more
	opened   atomic.Int64
}

func newLink(t *testing.T, server string) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	l := &link{listener: listener, server: server}
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			go l.carry(c, l.opened.Add(1))
		}
	}()
	return l
}

func (l *link) carry(client net.Conn, number int64) {
	server, err := net.Dial("tcp", l.server)
	if err != nil {
		client.Close()
		return
	}
	copyTo := func(to, from net.Conn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if number <= l.lost.Load() {
				return // neither end is told
			}
			if err != nil {
				to.Close()
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
	go copyTo(server, client)
	copyTo(client, server)
}

// A connection that was cut without a word is noticed within 15 s, whoever reads and however many were open.
func TestLostConnectionsAreNoticed(t *testing.T) {
	if testing.Short() {
		t.Skip("waits 10 s for a server that says nothing")
	}
	t.Parallel()
	release := make(chan struct{})
	var slow atomic.Bool
	data := make([]byte, 1<<20)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if slow.CompareAndSwap(true, false) {
			w.Header().Set("Content-Length", "1048576")
			w.Write(data[:64<<10])
			w.(http.Flusher).Flush()
			<-release
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer server.Close()
	defer close(release)
	l := newLink(t, server.Listener.Addr().String())
	at := (&url.URL{Scheme: "http", Host: l.listener.Addr().String(), Path: "/x"}).String()
	c := object.New(object.Config{})
	o, err := c.Stat(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	slow.Store(true)
	r, err := c.Read(t.Context(), o, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 4<<10)); err != nil {
		t.Fatal(err)
	}
	l.lost.Store(l.opened.Load())
	cut := time.Now()
	if n, err := io.Copy(io.Discard, r); err != nil || n != int64(len(data)-4<<10) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if took := time.Since(cut); took > 15*time.Second {
		t.Errorf("it took %v to go on", took)
	}
}

// Trouble that is the storage's can be told from what is wrong with a release.
func TestTroubleOfTheStorage(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refuses := "http://" + listener.Addr().String() + "/x"
	listener.Close()
	missing := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(missing.Close)
	c := object.New(object.Config{})
	for what, tt := range map[string]struct {
		url  string
		want bool
	}{"nobody listens": {refuses, true}, "there is no such object": {missing.URL + "/x", false}} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := c.ReadAll(ctx, tt.url, 100); err == nil || errors.Is(err, object.ErrUnavailable) != tt.want {
				t.Errorf("%v: unavailable: %v", err, errors.Is(err, object.ErrUnavailable))
			}
		})
	}
}

// A server that always gives just enough not to stall is given up, however often a read is resumed.
func TestASlowServerIsGivenUp(t *testing.T) {
	t.Parallel()
	data := make([]byte, 1<<20)
	for name, serve := range map[string]func(w http.ResponseWriter, rest []byte, gone <-chan struct{}){
		"it says no more after a little": func(w http.ResponseWriter, rest []byte, gone <-chan struct{}) {
			w.Write(rest[:min(len(rest), 4<<10)])
			w.(http.Flusher).Flush()
			<-gone
		},
		"it goes on, slowly": func(w http.ResponseWriter, rest []byte, gone <-chan struct{}) {
			for ; len(rest) > 4<<10; rest = rest[4<<10:] {
				w.Write(rest[:4<<10])
				w.(http.Flusher).Flush()
				select {
				case <-gone:
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				from := 0
				n, _ := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
				if r.Header.Get("Range") == "bytes=0-0" {
					http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
					return
				}
				w.Header().Set("Content-Length", fmt.Sprint(len(data)-from))
				if n > 0 {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(data)-1, len(data)))
					w.WriteHeader(http.StatusPartialContent)
				}
				serve(w, data[from:], r.Context().Done())
			}))
			t.Cleanup(server.Close)
			c := object.New(object.Config{StallTimeout: 50 * time.Millisecond, LeastRate: 1 << 20})
			o, err := c.Stat(t.Context(), server.URL)
			if err != nil {
				t.Fatal(err)
			}
			r, err := c.Read(t.Context(), o, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			began := time.Now()
			n, err := io.Copy(io.Discard, r)
			if !errors.Is(err, object.ErrUnavailable) || n == int64(len(data)) {
				t.Errorf("after %d bytes: %v, want ErrUnavailable", n, err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it took %v to give up", took)
			}
		})
	}
}
