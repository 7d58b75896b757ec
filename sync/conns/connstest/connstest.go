// Package connstest tests that a server bounds its connections.
package connstest

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Bounded opens most+200 connections to the server at address, and holds them. It fails the test if more than most of
// them stay open, or if answers returns false. answers makes a request on a new connection, and reports whether the
// server answered.
func Bounded(t *testing.T, address string, most int, answers func() bool) {
	t.Helper()
	var held []net.Conn
	for range most + 200 {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		held = append(held, c)
	}
	if !answers() { // connections are accepted in order, so all held ones have been by then
		t.Error("it doesn't answer beside connections that are held")
	}
	var open atomic.Int32
	var reads sync.WaitGroup
	for _, c := range held {
		reads.Go(func() {
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				open.Add(1)
			}
		})
	}
	if reads.Wait(); int(open.Load()) > most {
		t.Errorf("%d connections are held open, at most %d are allowed", open.Load(), most)
	}
}
