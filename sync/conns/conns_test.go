package conns

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// A request under way when the context ends is answered before Serve returns.
func TestServeEndsWithItsRequests(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	asked, answer, answered := make(chan struct{}), make(chan struct{}), make(chan struct{})
	s := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		close(asked)
		<-answer
		_, _ = io.WriteString(rw, "done")
		close(answered)
	})}
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, s, l, time.Minute) }()
	got := make(chan string, 1)
	go func() {
		r, err := http.Get("http://" + l.Addr().String())
		if err != nil {
			got <- err.Error()
			return
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if err != nil {
			got <- err.Error()
			return
		}
		got <- string(body)
	}()
	<-asked
	cancel()
	select {
	case err := <-served:
		t.Fatalf("it returned %v while a request was under way", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(answer)
	if err := <-served; err != nil {
		t.Error(err)
	}
	select {
	case <-answered:
	default:
		t.Error("it returned before the request was answered")
	}
	if text := <-got; text != "done" {
		t.Errorf("the client got %q", text)
	}
}

// A request that takes longer than the grace ends with its connection.
func TestServeClosesAfterItsGrace(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	})}
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, s, l, time.Millisecond) }()
	if r, err := http.Get("http://" + l.Addr().String()); err == nil {
		r.Body.Close()
		t.Error("the request was answered")
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// The newest connections stay; those that end make room.
func TestTheOldestIsClosed(t *testing.T) {
	t.Parallel()
	l := &Limit{Max: 3}
	var far, near []net.Conn
	open := func() {
		a, b := net.Pipe()
		t.Cleanup(func() { a.Close(); b.Close() })
		near, far = append(near, a), append(far, b)
		l.Note(a, http.StateNew)
	}
	for range 4 {
		open()
	}
	if _, err := far[0].Read(make([]byte, 1)); err == nil {
		t.Error("the oldest connection is open")
	}
	l.Note(near[0], http.StateClosed) // as the server does for a closed one
	l.Note(near[2], http.StateHijacked)
	l.Note(near[1], http.StateActive)
	open()
	for i, want := range []net.Conn{near[1], near[3], near[4]} {
		if len(l.open) != 3 || l.open[i] != want {
			t.Fatalf("open are %v", l.open)
		}
	}
}
