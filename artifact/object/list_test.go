package object_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/objecttest"
)

func TestList(t *testing.T) {
	t.Parallel()
	gateway := objecttest.Start(t)
	for name, kind := range map[string]struct {
		client *object.Client
		url    string
	}{
		"s3":   {gateway.Client(), gateway.URL("dir")},
		"file": {object.New(object.Config{}), "file://" + t.TempDir() + "/dir"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, c := t.Context(), kind.client
			if found, more, err := c.List(ctx, kind.url+"/app/", 10); err != nil || more || len(found) > 0 {
				t.Errorf("nothing there: %v, %v, %v", found, more, err)
			}
			for _, p := range []string{"app/1/manifest.yaml", "app/1+a b/manifest.yaml", "app/2/index", "application/1/index"} {
				url := kind.url + "/" + strings.ReplaceAll(p, " ", "%20")
				if err := c.Put(ctx, url, strings.NewReader(p), int64(len(p)), object.PutOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			found, more, err := c.List(ctx, kind.url+"/app/", 3)
			if err != nil || more {
				t.Fatalf("%v, %v", more, err)
			}
			var urls []string
			for _, o := range found {
				urls = append(urls, strings.TrimPrefix(o.URL, kind.url))
				if age := time.Since(o.Modified); age < -time.Minute || age > time.Minute {
					t.Errorf("%s was modified %v ago", o.URL, age)
				}
				if data, err := c.ReadAll(ctx, o.URL, o.Size); err != nil || int64(len(data)) != o.Size {
					t.Errorf("what was found can't be read: %s of %d bytes: %v", o.URL, o.Size, err)
				}
			}
			slices.Sort(urls)
			if want := []string{"/app/1+a%20b/manifest.yaml", "/app/1/manifest.yaml", "/app/2/index"}; !slices.Equal(urls, want) {
				t.Errorf("found %q, want %q", urls, want)
			}
			if found, more, err := c.List(ctx, kind.url+"/app/", 2); err != nil || !more || len(found) != 2 {
				t.Errorf("at most two: %v, %v, %v", found, more, err)
			}
			// What is found begins with the prefix, however that is spelt.
			for _, dir := range []string{"ü(1)!", "%C3%BC%281%29!", "a%2Fb", "100%25", "%2B"} {
				url := kind.url + "/" + dir + "/1/x"
				if err := c.Put(ctx, url, strings.NewReader("x"), 1, object.PutOptions{}); err != nil {
					t.Fatal(err)
				}
				if found, _, err := c.List(ctx, kind.url+"/"+dir+"/", 2); err != nil || len(found) != 1 || found[0].URL != url {
					t.Errorf("of %s: %v, %v", url, found, err)
				}
			}
			cancelled, cancel := context.WithCancel(ctx)
			cancel()
			if _, _, err := c.List(cancelled, kind.url+"/app/", 2); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
			if _, _, err := c.List(ctx, kind.url+"/app", 2); err == nil {
				t.Error("half a name is taken for a prefix")
			}
		})
	}
}

// S3 gives a thousand at a time.
func TestListManyPages(t *testing.T) {
	t.Parallel()
	gateway := objecttest.Start(t)
	dir := filepath.Join(gateway.Dir(), "many")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const objects = 2100
	for i := range objects {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for most, want := range map[int]int{10_000: objects, objects: objects, 1500: 1500, 1000: 1000} {
		c := gateway.Client()
		found, more, err := c.List(t.Context(), gateway.URL("many/"), most)
		if err != nil || len(found) != want || more != (want < objects) {
			t.Errorf("at most %d: %d, %v, %v", most, len(found), more, err)
		}
		slices.SortFunc(found, func(a, b object.Listed) int { return strings.Compare(a.URL, b.URL) })
		if twice := len(found) - len(slices.CompactFunc(found, func(a, b object.Listed) bool { return a.URL == b.URL })); twice > 0 {
			t.Errorf("at most %d: %d are there twice", most, twice)
		}
		if requests, _ := c.Requests(); int(requests) > most/1000+1 {
			t.Errorf("at most %d: %d requests", most, requests)
		}
	}
}

func TestListThatCannotBe(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"gs://bucket/app/", "https://example.com/app/"} {
		if _, _, err := object.New(object.Config{}).List(t.Context(), url, 10); !errors.Is(err, object.ErrNoList) {
			t.Errorf("%s: %v", url, err)
		}
	}
	if os.Geteuid() != 0 {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o100); err != nil {
			t.Fatal(err)
		}
		if _, _, err := object.New(object.Config{}).List(t.Context(), "file://"+dir+"/", 10); !errors.Is(err, object.ErrDenied) {
			t.Errorf("a directory that can't be read: %v", err)
		}
	}
	gateway := objecttest.Start(t)
	c := object.New(object.Config{S3: &object.S3Config{Endpoint: gateway.Endpoint(), Region: "us-east-1", AccessKey: "kedge-test", SecretKey: "wrong"}})
	if _, _, err := c.List(t.Context(), gateway.URL("app/"), 10); !errors.Is(err, object.ErrDenied) {
		t.Errorf("S3 with wrong credentials: %v", err)
	}
}

// A put to a directory ends with its context, and leaves nothing there.
func TestPutToAFileEndsWithItsContext(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	data := content(12 << 20)
	opt := object.PutOptions{Progress: func(sent int64) { cancel() }}
	err := object.New(object.Config{}).Put(ctx, "file://"+dir+"/x", strings.NewReader(string(data)), int64(len(data)), opt)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("it leaves %v", left)
	}
}
