package conns

import (
	"net"
	"net/http"
	"testing"
)

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
