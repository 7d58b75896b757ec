package object_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/object"
)

// A part of an object is asked for by its ETag, and what answers with another part, or with a part of another
// object, is not read.
func TestWhatIsNotThePart(t *testing.T) {
	t.Parallel()
	const size, from, n = 1000, 100, 50
	data := content(size)
	part := func(w http.ResponseWriter, etag string, from, n int) {
		w.Header().Set("ETag", etag)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, from+n-1, size))
		w.Header().Set("Content-Length", fmt.Sprint(n))
		w.WriteHeader(http.StatusPartialContent)
		w.Write(data[from : from+n])
	}
	for name, c := range map[string]struct {
		etag   string // as it is seen first
		answer func(w http.ResponseWriter)
		fails  bool
		want   error
	}{
		"the part":                 {`"one"`, func(w http.ResponseWriter) { part(w, `"one"`, from, n) }, false, nil},
		"the part, without ETags":  {"", func(w http.ResponseWriter) { part(w, "", from, n) }, false, nil},
		"another part":             {`"one"`, func(w http.ResponseWriter) { part(w, `"one"`, from+1, n) }, true, nil},
		"another part, no ETags":   {"", func(w http.ResponseWriter) { part(w, "", from-10, n) }, true, nil},
		"a part of another object": {`"one"`, func(w http.ResponseWriter) { part(w, `"two"`, from, n) }, true, object.ErrChanged},
		"a longer object, whole, without Range": {`"one"`, func(w http.ResponseWriter) {
			w.Header().Set("ETag", `"one"`)
			w.Write(append(bytes.Clone(data), 'x'))
		}, true, object.ErrChanged},
		"the object, without Range": {`"one"`, func(w http.ResponseWriter) {
			w.Header().Set("ETag", `"one"`)
			w.Write(data)
		}, false, nil},
		"no more such object": {`"one"`, func(w http.ResponseWriter) { w.WriteHeader(http.StatusPreconditionFailed) }, true, object.ErrChanged},
	} {
		serve := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "bytes=0-0" {
				part(w, c.etag, 0, 1)
				return
			}
			if match, part := r.Header.Get("If-Match"), r.Header.Get("Range"); match != c.etag || part != fmt.Sprintf("bytes=%d-%d", from, from+n-1) {
				t.Errorf("%s: asked for %q if it is %q", name, part, match)
			}
			c.answer(w)
		})
		server := httptest.NewServer(serve)
		t.Cleanup(server.Close)
		for url, client := range map[string]*object.Client{server.URL + "/object": object.New(object.Config{}), "s3://bucket/object": s3Stub(t, serve)} {
			o, err := client.Stat(t.Context(), url)
			if err != nil {
				t.Fatal(err)
			}
			r, err := client.ReadRange(t.Context(), o, from, n)
			if !c.fails {
				check(t, r, err, data[from:from+n])
				continue
			}
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%s, %s: %v, want %v", name, url, err, c.want)
			}
		}
	}
}

// A weak ETag says nothing of bytes, and no server takes one in If-Match.
func TestAWeakETagIsNone(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `W/"one"`)
		if r.Header.Get("If-Match") != "" {
			w.WriteHeader(http.StatusPreconditionFailed)
			return
		}
		w.Write(content(1000))
	}))
	t.Cleanup(server.Close)
	c := object.New(object.Config{})
	o, err := c.Stat(t.Context(), server.URL)
	if err != nil || o.ETag != "" {
		t.Fatalf("%+v, %v", o, err)
	}
	r, err := c.Read(t.Context(), o, 0)
	check(t, r, err, content(1000))
}

// Without a conditional put, what can't be seen could be there, and would be overwritten.
func TestAnUnconditionalPutMustSee(t *testing.T) {
	t.Parallel()
	for _, unconditional := range []bool{false, true} {
		var puts atomic.Int32
		serve := func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if r.Method == http.MethodPut {
				puts.Add(1)
				return
			}
			s3Fault(w, http.StatusForbidden, "AccessDenied")
		}
		c := s3Stub(t, serve, func(c *object.Config) { c.UnconditionalPut = unconditional })
		err := c.Put(t.Context(), "s3://bucket/x", strings.NewReader("one"), 3, object.PutOptions{})
		if unconditional != errors.Is(err, object.ErrDenied) || unconditional != (puts.Load() == 0) {
			t.Errorf("unconditional %v: %d puts, %v", unconditional, puts.Load(), err)
		}
	}
}

// An object's version is never written, neither in one piece nor in parts.
func TestAVersionIsNotWritten(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{3, 16<<20 + 1} {
		c := s3Stub(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet {
				t.Errorf("%d bytes: got %s %s", size, r.Method, r.URL)
			}
			s3Fault(w, http.StatusNotFound, "NoSuchVersion")
		})
		data := bytes.NewReader(make([]byte, size))
		err := c.Put(t.Context(), "s3://bucket/x?versionId=1", data, size, object.PutOptions{})
		if err == nil || !strings.Contains(err.Error(), "leave ?versionId out") {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// Two may publish the same version at once, and each have found nothing there: only the server can see to it that
// nothing is overwritten, and is asked to.
func TestAPutIsGuarded(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{3, 16<<20 + 1} {
		var mu sync.Mutex
		theirs := false
		c := s3Stub(t, func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			io.Copy(io.Discard, r.Body)
			q := r.URL.Query()
			switch {
			case r.Method == http.MethodPost && q.Has("uploads"):
				fmt.Fprint(w, "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
			case r.Method == http.MethodPut && q.Has("partNumber"):
				w.Header().Set("ETag", `"part"`)
			case r.Method == http.MethodPut, r.Method == http.MethodPost: // it would be there now
				theirs = true
				if r.Header.Get("If-None-Match") != "*" {
					t.Errorf("%d bytes: %s is not guarded", size, r.Method)
				}
				s3Fault(w, http.StatusPreconditionFailed, "PreconditionFailed")
			case r.Method == http.MethodDelete:
				w.WriteHeader(http.StatusNoContent)
			case theirs:
				w.Header().Set("ETag", `"theirs"`)
				http.ServeContent(w, r, "", time.Time{}, strings.NewReader("theirs"))
			default:
				s3Fault(w, http.StatusNotFound, "NoSuchKey")
			}
		})
		if err := c.Put(t.Context(), "s3://bucket/x", bytes.NewReader(make([]byte, size)), size, object.PutOptions{}); !errors.Is(err, object.ErrExists) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// The same of a directory: a file that came while another was written stays.
func TestAPutToAFileIsGuarded(t *testing.T) {
	t.Parallel()
	c, path := object.New(object.Config{}), filepath.Join(t.TempDir(), "dir", "x")
	url := "file://" + path
	ours := make([]byte, 5<<20) // more than is written before it tells of it
	var came sync.Once
	opt := object.PutOptions{Progress: func(int64) {
		came.Do(func() {
			if err := c.Put(t.Context(), url, strings.NewReader("theirs"), 6, object.PutOptions{}); err != nil {
				t.Error(err)
			}
		})
	}}
	if err := c.Put(t.Context(), url, bytes.NewReader(ours), int64(len(ours)), opt); !errors.Is(err, object.ErrExists) {
		t.Errorf("%v", err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "theirs" {
		t.Errorf("it holds %d bytes, %v", len(got), err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 { // as nodes may read it, whoever publishes
		t.Errorf("%v, %v", info, err)
	}
}

// What is larger than it may be is read no further.
func TestAReadIsBounded(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for zeros := make([]byte, 4096); ctx.Err() == nil; { // without end
			if _, err := w.Write(zeros); err != nil {
				return
			}
		}
	}))
	t.Cleanup(server.Close)
	c := object.New(object.Config{})
	if _, err := c.ReadAll(ctx, server.URL, 100_000); !errors.Is(err, object.ErrTooLarge) {
		t.Errorf("all: %v", err)
	}
	o := object.Object{URL: server.URL, Size: 1000, Ranges: true}
	for _, part := range [][2]int64{{-1, 10}, {0, 1001}, {990, 11}, {1001, 0}, {10, -1}} {
		before, _ := c.Requests()
		if r, err := c.ReadRange(ctx, o, part[0], part[1]); err == nil {
			r.Close()
			t.Errorf("%d bytes at %d of 1000 are read", part[1], part[0])
		}
		if now, _ := c.Requests(); now != before {
			t.Errorf("%d bytes at %d of 1000 are asked for", part[1], part[0])
		}
	}
}
