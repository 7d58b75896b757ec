package open_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/kv"
	"kedge/kv/open"
)

func TestStore(t *testing.T) {
	t.Setenv("CONSUL_HTTP_ADDR", "http://127.0.0.1:1")
	odd := filepath.Join(t.TempDir(), "a b#c%20?d")
	for _, c := range []struct {
		config open.Config
		want   string
	}{
		{open.Config{}, "consul at http://127.0.0.1:1, prefix kedge/"},
		{open.Config{URL: "consul", Prefix: "team/kedge"}, "consul at http://127.0.0.1:1, prefix team/kedge/"},
		{open.Config{URL: "file://" + odd}, "directory " + odd},
		{open.Config{URL: "file://" + odd, Existing: true}, "directory " + odd},
	} {
		s, err := open.Store(c.config)
		if err != nil {
			t.Errorf("%+v: %v", c.config, err)
			continue
		}
		if s.String() != c.want {
			t.Errorf("%+v opened %q, want %q", c.config, s, c.want)
		}
		s.Close()
	}
	if _, err := os.Stat(odd); err != nil {
		t.Errorf("the directory's name was changed: %v", err)
	}
	for _, bad := range []open.Config{
		{URL: "http://127.0.0.1:8500"}, {URL: "file://relative/dir"}, {URL: "file:relative"}, {URL: "etcd"},
		{Prefix: "/kedge/"}, {Prefix: "a/../b"},
	} {
		if _, err := open.Store(bad); !errors.As(err, new(kv.ConfigError)) {
			t.Errorf("%+v: %v, want a ConfigError", bad, err)
		}
	}
	_, err := open.Store(open.Config{URL: "http://me:secret@127.0.0.1:8500"})
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("with a password: %v", err)
	}
	for _, address := range []string{
		"me:secret@127.0.0.1:8500", "http://me:secret@127.0.0.1:8500", "https://secret@consul.example.com/consul",
		"http://me:se/secret@h:8500", "me:se?secret@h", "http:/me:secret@h:8500", "http//me:secret@h", "h:8500?token=secret",
		"http://h:8500/?token=secret", "http://me:se secret@h", "unix://me:secret@/x", "http://h#secret",
	} {
		t.Setenv("CONSUL_HTTP_ADDR", address)
		if _, err := open.Store(open.Config{}); !errors.As(err, new(kv.ConfigError)) ||
			strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "CONSUL_HTTP_AUTH") {
			t.Errorf("with the address %s: %v", address, err)
		}
	}
	for _, address := range []string{
		"127.0.0.1:8500", "[::1]:8500", "https://consul.example.com/a/b", "unix:///run/a@b.sock",
	} {
		t.Setenv("CONSUL_HTTP_ADDR", address)
		if s, err := open.Store(open.Config{}); err != nil {
			t.Errorf("with the address %s: %v", address, err)
		} else {
			s.Close()
		}
	}
	missing := open.Config{URL: "file://" + filepath.Join(t.TempDir(), "none"), Existing: true}
	if _, err := open.Store(missing); err == nil || errors.As(err, new(kv.ConfigError)) {
		t.Errorf("a directory that isn't there, and must be: %v", err)
	}
}
