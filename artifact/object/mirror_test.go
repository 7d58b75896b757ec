package object

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestPlaces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := New(Config{Mirrors: Mirrors{
			"s3://acme/":     {"s3://euw1/", "http://127.0.0.1:1/acme"},
			"s3://acme/web/": {"s3://web"},
		}})
		check := func(url string, want ...string) []Source {
			t.Helper()
			sources := c.Sources(url)
			var got []string
			for _, s := range sources {
				got = append(got, s.URL)
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: %q, want %q", url, got, want)
			}
			return sources
		}
		check("s3://acme/web/1/index", "s3://web/1/index", "s3://acme/web/1/index")
		check("s3://acme/webx", "s3://euw1/webx", "http://127.0.0.1:1/acme/webx", "s3://acme/webx")
		check("s3://acmex/1", "s3://acmex/1")
		check("s3://acme/../other/1", "s3://acme/../other/1")
		check("https://acme/1", "https://acme/1")

		all := check("s3://acme/1", "s3://euw1/1", "http://127.0.0.1:1/acme/1", "s3://acme/1")
		c.NoteFailure(all[0], fmt.Errorf("x: %w", ErrNotFound))
		check("s3://acme/1", "s3://euw1/1", "http://127.0.0.1:1/acme/1", "s3://acme/1")
		c.NoteFailure(all[0], errors.New("other bytes"))
		c.NoteFailure(all[2], errors.New("its own place"))
		check("s3://acme/2", "http://127.0.0.1:1/acme/2", "s3://acme/2", "s3://euw1/2")
		time.Sleep(mirrorPause)
		check("s3://acme/2", "s3://euw1/2", "http://127.0.0.1:1/acme/2", "s3://acme/2")
	})
}

func TestMirrorsCheck(t *testing.T) {
	t.Parallel()
	for _, good := range []Mirrors{
		nil,
		{"s3://acme/": {"s3://euw1/", "https://x/y", "http://127.0.0.1:1/a/", "file:///mnt/releases"}},
		{"s3://acme": {"gs://x"}},
	} {
		if err := good.Check(); err != nil {
			t.Errorf("%v: %v", good, err)
		}
	}
	for _, bad := range []Mirrors{
		{"s3://acme": nil}, {"acme": {"s3://x"}},
		{"s3://acme": {"http://10.0.0.1/x"}}, {"s3://acme": {"https://u:hunter2@x/"}},
		{"s3://acme": {"ftp://x/"}}, {"s3://acme": {""}},
	} {
		if err := bad.Check(); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
