package consul_test

import (
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

// endless answers with begin, and then with more of rest until the client goes away. It counts the bytes in sent.
func endless(begin, rest string, sent *atomic.Int64) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("X-Consul-Index", "1")
		w.Header().Set("X-Consul-KnownLeader", "true")
		w.Header().Set("X-Consul-LastContact", "0")
		text := begin
		for {
			n, err := w.Write([]byte(text))
			if sent.Add(int64(n)); err != nil {
				return true
			}
			text = rest
		}
	}
}

// No answer is read without an end: of a list not more than there is room for, of anything else not more than a value
// and what comes with it can have.
func TestEndlessAnswers(t *testing.T) {
	t.Parallel()
	if kvtest.RaceDetector {
		t.Skip("run it without the race detector, as .ci/test does: 32 MiB take too long to read with it")
	}
	f := newFront(t, kvtest.StartConsul(t, kvtest.ConsulOptions{}))
	s := open(t, consul.Config{Client: f.config("")})
	web := func() error { _, err := s.List(t.Context(), "pins/prod/web/"); return err }
	get := func() error { _, err := s.Get(t.Context(), "pins/prod/web/app"); return err }
	spaces := strings.Repeat(" ", 64<<10)
	pair := `{"Key":"kedge/pins/prod/web/` + strings.Repeat("k", 100) + `","ModifyIndex":7,"Value":null},`
	folder := strings.Replace(pair, `",`, `/",`, 1)
	for name, c := range map[string]struct {
		begin, rest string
		ask         func() error
		want        error
		most        int64 // bytes that are sent
	}{
		"a list of short keys": {"[" + pair, strings.Repeat(pair, 400), web, kv.ErrTooLarge, kv.MaxRoleList},
		"a list of folders":    {"[" + folder, strings.Repeat(folder, 400), web, kv.ErrTooLarge, kv.MaxRoleList},
		"a list of one key":    {`[{"Key":"`, strings.Repeat("k", 64<<10), web, kv.ErrUnavailable, 17 << 20},
		"a list of spaces":     {"[", spaces, web, kv.ErrUnavailable, 17 << 20},
		"spaces before a list": {"", spaces, web, kv.ErrUnavailable, 17 << 20},
		"spaces between keys":  {"[" + pair, spaces, web, kv.ErrUnavailable, 33 << 20},
		"one key":              {`[{"Value":"`, strings.Repeat("A", 64<<10), get, kv.ErrUnavailable, 17 << 20},
	} {
		var sent atomic.Int64
		f.setAnswer(endless(c.begin, c.rest, &sent))
		if err := c.ask(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if n := sent.Load(); n > c.most+8<<20 { // what the sockets hold
			t.Errorf("%s: %d MiB were read", name, n>>20)
		}
	}
	for name, answer := range map[string]string{"cut off": "[" + pair, "no list": `{"Key":"k"}`, "nothing": ""} {
		f.setAnswer(func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("X-Consul-LastContact", "0")
			_, _ = w.Write([]byte(answer))
			return true
		})
		if err := web(); !errors.Is(err, kv.ErrUnavailable) || errors.Is(err, kv.ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
