package object_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
)

// An https source asks with the headers that a file has for its host and port, and a redirect to another host doesn't
// carry them. No error tells what they are.
func TestHeadersFromAFile(t *testing.T) {
	told := make(chan http.Header, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		told <- r.Header
		http.ServeContent(w, r, "x", time.Time{}, strings.NewReader("elsewhere"))
	}))
	defer other.Close()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("X-Api-Key") != "s3cret: key":
			http.Error(w, "who?", http.StatusUnauthorized)
		case r.URL.Path == "/away":
			http.Redirect(w, r, other.URL+"/x", http.StatusFound)
		case r.URL.Path == "/near":
			http.Redirect(w, r, "/x", http.StatusFound)
		default:
			http.ServeContent(w, r, "x", time.Time{}, strings.NewReader("content"))
		}
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	client := object.New(object.Config{})
	read := func(path string) (string, error) {
		data, err := client.ReadAll(t.Context(), server.URL+path, 100)
		return string(data), err
	}
	file := filepath.Join(t.TempDir(), "headers")
	t.Setenv("NETRC", os.DevNull)
	t.Setenv("KEDGE_HTTP_HEADERS_FILE", file)
	if _, err := read("/x"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("there is no file: %v", err)
	}
	const malformed = "line 1: "
	for text, want := range map[string]string{ // "": what it says of the error
		host + " X-Api-Key: s3cret: key":                                            "",
		"# ours\r\n\r\n" + host + "\tx-api-key:s3cret: key\r\n":                     "",
		"\ufeffexample.com X-Api-Key: other\n" + host + " X-Api-Key: s3cret: key\n": "",
		host + " Authorization: Bearer x\n" + host + " X-Api-Key: s3cret: key\n":    "",
		host + " X-Api-Key: s3cret wrong":                                           "401",
		"127.0.0.1 X-Api-Key: s3cret: key":                                          "401", // that is port 443
		"127.0.0.1:1 X-Api-Key: s3cret: key":                                        "401",
		"":                                                                          "401",
		host + " X-Api-Key s3cret":                                                  malformed,
		host + " : s3cret":                                                          malformed,
		host + " X-Api-Key:":                                                        malformed,
		server.URL + " X-Api-Key: s3cret: key":                                      malformed,
		host + " X Api: s3cret":                                                     malformed,
		host + " X-Api-Key: s3cret\x01":                                             malformed,
		host + " Range: bytes=0-s3cret":                                             malformed,
		host + " Host: s3cret":                                                      malformed,
		"example.com X-Api-Key: " + strings.Repeat("s3cret", 1<<20) + "\n" + host + " X: s3cret": "more than",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := read("/x")
		switch {
		case want == "" && (err != nil || got != "content"):
			t.Errorf("%.80q: got %q, %v", text, got, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%.80q: got %q, %v; want %q", text, got, err, want)
		case err != nil && strings.Contains(err.Error(), "s3cret"):
			t.Errorf("the error tells the header: %v", err)
		}
	}
	text := fmt.Sprintf("%s X-Api-Key: s3cret: key\n%s Authorization: Bearer s3cret\n", host, host)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := client.Stat(t.Context(), server.URL+"/away")
	if err != nil || o.Size != int64(len("elsewhere")) {
		t.Errorf("%+v, %v", o, err)
	}
	for path, want := range map[string]string{"/away": "elsewhere", "/near": "content"} {
		if got, err := read(path); err != nil || got != want {
			t.Errorf("%s: got %q, %v", path, got, err)
		}
	}
	if len(told) < 2 {
		t.Errorf("the other host was asked %d times", len(told))
	}
	for len(told) > 0 {
		if h := <-told; strings.Contains(fmt.Sprint(h), "s3cret") {
			t.Errorf("another host was told %v", h)
		}
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	_, err = read("/x")
	if err == nil || errors.Is(err, object.ErrDenied) || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("others may read the file: %v", err)
	}
}
