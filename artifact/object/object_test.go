package object_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/objecttest"
)

func content(n int) []byte {
	data := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(data)
	return data
}

// What every kind of storage that can be written to promises.
func TestStorage(t *testing.T) {
	t.Parallel()
	gateway := objecttest.Start(t)
	gs := startGS(t)
	for name, kind := range map[string]struct {
		client *object.Client
		url    string
	}{
		"s3":   {gateway.Client(), gateway.URL("dir")},
		"gs":   {gs, "gs://bucket/dir"},
		"file": {object.New(object.Config{}), "file://" + t.TempDir() + "/dir"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, c := t.Context(), kind.client
			for _, size := range []int{0, 1, 1000, 17 << 20, 40 << 20} {
				if name == "gs" && size > 1000 {
					continue
				}
				url, data := fmt.Sprintf("%s/%d of them", kind.url, size), content(size)
				url = strings.ReplaceAll(url, " ", "+")
				sent := int64(-1)
				if err := c.Put(ctx, url, bytes.NewReader(data), int64(size), object.PutOptions{Progress: func(n int64) { sent = n }}); err != nil {
					t.Fatal(err)
				}
				if sent != int64(size) {
					t.Errorf("%d of %d bytes were told of", sent, size)
				}
				o, err := c.Stat(ctx, url)
				if err != nil || o.Size != int64(size) || o.ETag == "" {
					t.Fatalf("stat: %+v, %v", o, err)
				}
				got, err := c.ReadAll(ctx, url, int64(size))
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("read all: %d bytes, %v", len(got), err)
				}
				if size >= 1000 {
					r, err := c.ReadRange(ctx, o, 100, 500)
					check(t, r, err, data[100:600])
					r, err = c.Read(ctx, o, int64(size)-7)
					check(t, r, err, data[size-7:])
					if _, err := c.ReadAll(ctx, url, int64(size)-1); !errors.Is(err, object.ErrTooLarge) {
						t.Errorf("a bound that is too low: %v", err)
					}
				}
				// Written again: the same bytes are fine, others are not.
				if err := c.Put(ctx, url, bytes.NewReader(data), int64(size), object.PutOptions{}); err != nil {
					t.Errorf("the same bytes again: %v", err)
				}
				other := bytes.Clone(data)
				if size > 0 {
					other[size/2]++
				} else {
					other = []byte("x")
				}
				if err := c.Put(ctx, url, bytes.NewReader(other), int64(len(other)), object.PutOptions{}); !errors.Is(err, object.ErrExists) {
					t.Errorf("other bytes: %v", err)
				}
				if got, err := c.ReadAll(ctx, url, int64(size)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("after that: %d bytes, %v", len(got), err)
				}
			}
			if _, err := c.Stat(ctx, kind.url+"/nowhere"); !errors.Is(err, object.ErrNotFound) {
				t.Errorf("stat of nothing: %v", err)
			}
			if _, err := c.ReadAll(ctx, kind.url+"/nowhere", 10); !errors.Is(err, object.ErrNotFound) {
				t.Errorf("read of nothing: %v", err)
			}
		})
	}
}

func check(t *testing.T, r io.ReadCloser, err error, want []byte) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v; want %d", len(got), err, len(want))
	}
}

// startGS plays what of Google's XML API is used: no server of it can be had.
func startGS(t *testing.T) *object.Client {
	files := t.TempDir()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := filepath.Join(files, strings.ReplaceAll(r.URL.Path, "/", "_"))
		if r.Method == http.MethodPut {
			if r.Header.Get("X-Goog-If-Generation-Match") != "0" {
				http.Error(w, "unguarded", http.StatusBadRequest)
				return
			}
			f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
			if err != nil {
				w.WriteHeader(http.StatusPreconditionFailed)
				return
			}
			defer f.Close()
			io.Copy(f, r.Body)
			return
		}
		if _, err := os.Stat(path); err == nil {
			w.Header().Set("ETag", `"1"`)
		}
		http.ServeFile(w, r, path)
	}))
	t.Cleanup(server.Close)
	return object.New(object.Config{GSEndpoint: server.URL})
}

// faulty is an HTTP server with one object that misbehaves.
func faulty(t *testing.T, data []byte, misbehave func(n int, w http.ResponseWriter, r *http.Request) bool) (url string, requests *atomic.Int32) {
	requests = &atomic.Int32{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := int(requests.Add(1))
		w.Header().Set("ETag", `"one"`)
		if misbehave(n, w, r) {
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(server.Close)
	return server.URL + "/object", requests
}

func TestCutConnectionsAreResumed(t *testing.T) {
	t.Parallel()
	data := content(1 << 20)
	url, requests := faulty(t, data, func(n int, w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || n > 4 {
			return false
		}
		http.ServeContent(&cutting{w, 100_000}, r, "", time.Time{}, bytes.NewReader(data))
		return true
	})
	c := object.New(object.Config{})
	o, err := c.Stat(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Read(t.Context(), o, 0)
	check(t, r, err, data)
	if requests.Load() < 4 {
		t.Errorf("%d requests: nothing was cut", requests.Load())
	}
}

// cutting ends a connection after some bytes.
type cutting struct {
	http.ResponseWriter
	left int
}

func (c *cutting) Write(p []byte) (int, error) {
	if len(p) > c.left {
		c.ResponseWriter.Write(p[:c.left])
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestThrottlingIsWaitedOut(t *testing.T) {
	t.Parallel()
	data := content(1000)
	url, _ := faulty(t, data, func(n int, w http.ResponseWriter, r *http.Request) bool {
		if n <= 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		return false
	})
	if got, err := object.New(object.Config{}).ReadAll(t.Context(), url, 1000); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestWhatIsNotTheObject(t *testing.T) {
	t.Parallel()
	data := content(1000)
	for status, want := range map[int]error{http.StatusNotFound: object.ErrNotFound, http.StatusForbidden: object.ErrDenied, http.StatusTeapot: nil} {
		url, requests := faulty(t, data, func(n int, w http.ResponseWriter, r *http.Request) bool {
			http.Error(w, "<html>an error page</html>", status)
			return true
		})
		got, err := object.New(object.Config{}).ReadAll(t.Context(), url, 1000)
		if err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("status %d: %q, %v", status, got, err)
		}
		if requests.Load() != 1 {
			t.Errorf("status %d was tried %d times", status, requests.Load())
		}
	}
}

func TestServerThatIgnoresRange(t *testing.T) {
	t.Parallel()
	data := content(10_000)
	url, _ := faulty(t, data, func(_ int, w http.ResponseWriter, r *http.Request) bool {
		r.Header.Del("Range")
		return false
	})
	c := object.New(object.Config{})
	o, err := c.Stat(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.ReadRange(t.Context(), o, 5000, 100)
	check(t, r, err, data[5000:5100])
}

// A server that honours Range may not know the size of what it generates: Stat reads the object to
// learn the size.
func TestServerThatHonoursRangeAndKnowsNoSize(t *testing.T) {
	t.Parallel()
	data := content(10_000)
	url, _ := faulty(t, data, func(_ int, w http.ResponseWriter, r *http.Request) bool {
		var from, to int
		if n, _ := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); n < 2 {
			w.(http.Flusher).Flush() // so that no Content-Length is sent
			w.Write(data)
			return true
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", from, to))
		w.WriteHeader(http.StatusPartialContent)
		w.Write(data[from : to+1])
		return true
	})
	c := object.New(object.Config{})
	o, err := c.Stat(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	if o.Size != int64(len(data)) || !o.Ranges {
		t.Errorf("got %+v", o)
	}
	r, err := c.ReadRange(t.Context(), o, 5000, 100)
	check(t, r, err, data[5000:5100])
}

// What is read over there may stall as what is wanted may.
func TestAServerThatIgnoresRangeAndStalls(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	data := content(100_000)
	url, requests := faulty(t, data, func(n int, w http.ResponseWriter, r *http.Request) bool {
		r.Header.Del("Range")
		if n != 2 {
			return false
		}
		w.Write(data[:50_000])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	c := object.New(object.Config{StallTimeout: time.Second})
	o, err := c.Stat(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.ReadRange(ctx, o, 60_000, 100)
	check(t, r, err, data[60_000:60_100])
	if requests.Load() < 3 {
		t.Errorf("%d requests: none stalled", requests.Load())
	}
}

func TestObjectThatChangesWhileItIsRead(t *testing.T) {
	t.Parallel()
	gateway := objecttest.Start(t)
	c, url := gateway.Client(), gateway.URL("x")
	if err := c.Put(t.Context(), url, strings.NewReader("one"), 3, object.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	o, err := c.Stat(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	o.ETag = `"another"`
	if _, err := c.ReadRange(t.Context(), o, 1, 1); !errors.Is(err, object.ErrChanged) {
		t.Errorf("S3: %v", err)
	}
	path := filepath.Join(t.TempDir(), "x")
	os.WriteFile(path, []byte("one"), 0o644)
	if o, err = c.Stat(t.Context(), "file://"+path); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(path, []byte("another"), 0o644)
	if _, err := c.Read(t.Context(), o, 0); !errors.Is(err, object.ErrChanged) {
		t.Errorf("file: %v", err)
	}
}

func TestWrongCredentials(t *testing.T) {
	t.Parallel()
	gateway := objecttest.Start(t)
	c := object.New(object.Config{S3: &object.S3Config{Endpoint: gateway.Endpoint(), Region: "us-east-1", AccessKey: "kedge-test", SecretKey: "hunter2"}})
	_, err := c.ReadAll(t.Context(), gateway.URL("x"), 10)
	if !errors.Is(err, object.ErrDenied) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("%v", err)
	}
}

func TestOutageEndsInAnError(t *testing.T) {
	t.Parallel()
	gateway := objecttest.Start(t)
	c := gateway.Client()
	gateway.Stop()
	if _, err := c.ReadAll(t.Context(), gateway.URL("x"), 10); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("%v", err)
	}
}

func TestMaxBandwidth(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, content(2<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := object.New(object.Config{MaxBandwidth: 4 << 20}).ReadAll(t.Context(), "file://"+path, 2<<20); err != nil {
		t.Fatal(err)
	}
	// Two MiB at four a second, less the first chunk's free ride.
	if took := time.Since(start); took < 300*time.Millisecond {
		t.Errorf("2 MiB at 4 MiB/s took %v", took)
	}
}

// Where plain http isn't accepted, a redirect doesn't lead to it.
func TestARedirectToPlainHTTP(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.RedirectHandler("http://elsewhere.example/x", http.StatusFound))
	defer server.Close()
	_, err := object.New(object.Config{}).ReadAll(t.Context(), server.URL+"/x", 10)
	if err == nil || !strings.Contains(err.Error(), "plain http") {
		t.Errorf("%v", err)
	}
}

// A signed URL is nobody's but the server's that it leads to.
func TestARedirectDoesNotTellWhereFrom(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Header.Get("Referer"))
	}))
	defer other.Close()
	server := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusFound))
	defer server.Close()
	if told, err := object.New(object.Config{}).ReadAll(t.Context(), server.URL+"/x?signature=secret", 1000); err != nil || len(told) > 0 {
		t.Errorf("it is told %s, %v", told, err)
	}
}

// A URL may be signed, and whoever reads an error or a log could use the signature.
func TestASignatureIsNotTold(t *testing.T) {
	t.Parallel()
	data := content(1000)
	url, _ := faulty(t, data, func(n int, w http.ResponseWriter, r *http.Request) bool {
		if n > 1 {
			w.WriteHeader(http.StatusNotFound)
		}
		return n > 1
	})
	var log bytes.Buffer
	c := object.New(object.Config{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	signed := url + "?X-Signature=secret"
	o, err := c.Stat(t.Context(), signed)
	if err != nil {
		t.Fatal(err)
	}
	_, notThere := c.Read(t.Context(), o, 1)
	_, tooFar := c.ReadRange(t.Context(), o, 2000, 1)
	_, all := c.ReadAll(t.Context(), signed, 10)
	_, again := c.Stat(t.Context(), signed)
	_, elsewhere := c.Stat(t.Context(), "http://h.example/x?X-Signature=secret")
	_, nowhere := c.Stat(t.Context(), "https://user:secret@h:x/y?X-Signature=secret")
	for i, err := range []error{notThere, tooFar, all, again, elsewhere, nowhere,
		c.Put(t.Context(), signed, bytes.NewReader(data), 1, object.PutOptions{}), c.Replace(t.Context(), signed, data, "")} {
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%d: %v", i, err)
		}
	}
	if strings.Contains(log.String(), "secret") {
		t.Error(log.String())
	}
}
