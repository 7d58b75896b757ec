package main

import (
	"net"
	"sync"
	"testing"
)

// wire is the network between a process and what it talks to, which can fail in ways that no server does by itself.
type wire struct {
	addr string // what the process dials

	mu    sync.Mutex
	fault wireFault
	conns map[net.Conn]*lostBytes
	ended bool
}

type wireFault string

const (
	wireWhole  wireFault = ""
	wireSilent wireFault = "silent" // nothing arrives at either end, and no connection ends
	wireDeaf   wireFault = "deaf"   // what is asked arrives, no answer does
	wireTorn   wireFault = "torn"   // answers end after their first bytes
)

// tornAfter is how many bytes of an answer arrive over a torn wire.
const tornAfter = 300

// newWire connects what dials it to target, until the test ends.
func newWire(t testing.TB, target string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{addr: l.Addr().String(), conns: map[net.Conn]*lostBytes{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { w.connect(near, target) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		w.mu.Lock()
		w.ended = true
		for c := range w.conns {
			c.Close()
		}
		w.mu.Unlock()
		wg.Wait()
	})
	return w
}

// set makes the wire fail, or, with wireWhole, whole again: connections that lost bytes end then, as behind a router
// that has forgotten them.
func (w *wire) set(f wireFault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = f
	for c, lost := range w.conns {
		if f == wireWhole && lost.is(false) {
			c.Close()
		}
	}
}

func (w *wire) now() wireFault {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fault
}

// keep notes a connection, to be closed in the end.
func (w *wire) keep(c net.Conn, lost *lostBytes) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		c.Close()
		return false
	}
	w.conns[c] = lost
	return true
}

func (w *wire) drop(c net.Conn) {
	c.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, c)
}

func (w *wire) connect(near net.Conn, target string) {
	lost := new(lostBytes)
	if !w.keep(near, lost) {
		return
	}
	defer w.drop(near)
	far, err := net.Dial("tcp", target)
	if err != nil || !w.keep(far, lost) {
		return
	}
	defer w.drop(far)
	var wg sync.WaitGroup
	wg.Go(func() {
		w.carry(far, near, lost, func(f wireFault) bool { return f == wireSilent }, -1)
		far.Close()
	})
	wg.Go(func() {
		w.carry(near, far, lost, func(f wireFault) bool { return f == wireSilent || f == wireDeaf }, tornAfter)
		near.Close()
	})
	wg.Wait()
}

// lostBytes is set once a connection has lost some: it carries nothing more.
type lostBytes struct {
	mu   sync.Mutex
	lost bool
}

func (l *lostBytes) is(now bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost = l.lost || now
	return l.lost
}

// carry copies until either end closes, or a torn wire has carried as many bytes as torn; below 0: it tears nothing.
func (w *wire) carry(to, from net.Conn, lost *lostBytes, loses func(wireFault) bool, torn int) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		fault := w.now()
		switch {
		case n == 0:
		case lost.is(loses(fault)):
		case fault == wireTorn && torn >= 0 && n > torn:
			to.Write(buf[:torn])
			return
		default:
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
