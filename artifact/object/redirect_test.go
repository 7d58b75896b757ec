package object

import (
	"errors"
	"net/http"
	"testing"
)

func TestWhereARedirectMayLead(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, to string
		want     error
	}{
		{"https://one.example/x", "https://two.example/x", nil},
		{"https://one.example/x", "http://one.example/x", errPlainHTTP},
		{"https://one.example/x", "http://127.0.0.1:8500/x", errToHere},
		{"https://one.example/x", "https://[::1]/x", errToHere},
		{"https://one.example/x", "http://169.254.169.254/x", errPlainHTTP},
		{"https://one.example/x", "file:///etc/passwd", errPlainHTTP},
		{"http://localhost/x", "http://127.0.0.1:8500/x", nil},
		{"http://localhost/x", "https://one.example/x", nil},
		{"http://localhost/x", "http://one.example/x", errPlainHTTP},
	} {
		from, err := http.NewRequest(http.MethodGet, c.from, nil)
		if err != nil {
			t.Fatal(err)
		}
		to, err := http.NewRequest(http.MethodGet, c.to, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := checkRedirect(to, []*http.Request{from}); !errors.Is(err, c.want) {
			t.Errorf("from %s to %s: %v, want %v", c.from, c.to, err, c.want)
		}
		many := []*http.Request{from, from, from, from, from, from, from, from, from, from}
		if err := checkRedirect(to, many); err == nil {
			t.Errorf("from %s to %s in the end: no error", c.from, c.to)
		}
	}
}
