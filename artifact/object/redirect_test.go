package object

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

var errElsewhere = errors.New("not from there")

func TestWhereARedirectMayLead(t *testing.T) {
	t.Parallel()
	client := New(Config{Sources: []string{"http://named.example/"}, Redirect: func(url string) error {
		if url == "https://elsewhere.example/x" {
			return errElsewhere
		}
		return nil
	}})
	for _, c := range []struct {
		from, to string
		want     error
	}{
		{"https://one.example/x", "https://two.example/x", nil},
		{"https://one.example/x", "http://one.example/x", errToPlainHTTP},
		{"https://localhost/x", "http://localhost/x", errToPlainHTTP},
		{"https://one.example/x", "https://elsewhere.example/x?y", errElsewhere},
		{"http://localhost/x", "gopher://localhost/x", errPlainHTTP},
		{"https://one.example/x", "http://127.0.0.1:8500/x", errToHere},
		{"https://one.example/x", "https://[::1]/x", errToHere},
		{"https://one.example/x", "http://169.254.169.254/x", errToHere},
		{"https://one.example/x", "https://169.254.169.254/x", errToHere},
		{"https://one.example/x", "https://[fe80::1%25eth0]/x", errToHere},
		{"https://one.example/x", "https://[fd00:ec2::254]/x", errToHere},
		{"https://one.example/x", "https://0.0.0.0/x", errToHere},
		{"https://one.example/x", "https://[::]/x", errToHere},
		{"https://one.example/x", "https://[::ffff:127.0.0.1]/x", errToHere},
		{"https://one.example/x", "https://LOCALHOST./x", errToHere},
		{"https://one.example/x", "https://a.localhost/x", errToHere},
		{"https://0.0.0.0/x", "https://127.0.0.1/x", errToHere},
		{"https://169.254.1.1/x", "https://169.254.1.1/y", nil},
		{"https://one.example/x", "file:///etc/passwd", errToPlainHTTP},
		{"http://localhost/x", "http://127.0.0.1:8500/x", nil},
		{"http://localhost/x", "https://one.example/x", nil},
		{"http://localhost/x", "http://one.example/x", errPlainHTTP},
		{"http://named.example/x", "http://named.example/y", nil},
		{"http://named.example/x", "http://one.example/x", errPlainHTTP},
		{"http://named.example/x", "http://127.0.0.1/x", errToHere},
		{"https://named.example/x", "http://named.example/x", errToPlainHTTP},
	} {
		from, err := http.NewRequest(http.MethodGet, c.from, nil)
		if err != nil {
			t.Fatal(err)
		}
		to, err := http.NewRequest(http.MethodGet, c.to, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := client.checkRedirect(to, []*http.Request{from}); !errors.Is(err, c.want) {
			t.Errorf("from %s to %s: %v, want %v", c.from, c.to, err, c.want)
		}
		many := []*http.Request{from, from, from, from, from, from, from, from, from, from}
		if err := client.checkRedirect(to, many); err == nil {
			t.Errorf("from %s to %s in the end: no error", c.from, c.to)
		}
	}
}

// Each hop of a redirect is held to the bounds, and one that isn't allowed is told at once, without what may be secret.
func TestRedirectsKeepBounds(t *testing.T) {
	t.Parallel()
	reached := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/allowed/far":
			http.Redirect(w, r, "/allowed/near", http.StatusFound)
		case "/allowed/near":
			http.Redirect(w, r, "/elsewhere/x?X-Amz-Signature=s3cret", http.StatusFound)
		case "/allowed/home":
			http.Redirect(w, r, "/allowed/x?X-Amz-Signature=s3cret", http.StatusTemporaryRedirect)
		default:
			reached++
			fmt.Fprint(w, "here")
		}
	}))
	defer server.Close()
	client := New(Config{Redirect: func(url string) error {
		if !strings.HasPrefix(url, server.URL+"/allowed/") || strings.Contains(url, "?") {
			return errElsewhere
		}
		return nil
	}})
	if _, err := client.ReadAll(t.Context(), server.URL+"/allowed/far", 100); !errors.Is(err, errElsewhere) || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("out of bounds: %v", err)
	}
	if reached > 0 {
		t.Error("the request was sent")
	}
	if data, err := client.ReadAll(t.Context(), server.URL+"/allowed/home", 100); err != nil || string(data) != "here" {
		t.Errorf("within bounds: %q, %v", data, err)
	}
}

// A server that doesn't say how large an object is, as it makes its answers as it goes, is read all the same.
func TestServerWithoutContentLength(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("0123456789", 10_000)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for part := range strings.SplitSeq(text, "9") {
			fmt.Fprint(w, part)
			w.(http.Flusher).Flush()
		}
	}))
	defer server.Close()
	client, want := New(Config{}), strings.ReplaceAll(text, "9", "")
	o, err := client.Stat(t.Context(), server.URL+"/x")
	if err != nil || o.Size != int64(len(want)) || o.Ranges {
		t.Fatalf("%+v, %v", o, err)
	}
	r, err := client.Read(t.Context(), o, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if data, err := io.ReadAll(r); err != nil || string(data) != want {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if data, err := client.ReadAll(t.Context(), server.URL+"/x", 1<<20); err != nil || string(data) != want {
		t.Errorf("%d bytes at once, %v", len(data), err)
	}
}
