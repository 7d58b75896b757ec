// Package open opens the store that a URL names. It is the only package that knows every implementation.
package open

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/dir"
)

// Config names a store. The zero value means Consul by its own environment variables, with kv.DefaultPrefix.
type Config struct {
	// URL is empty or "consul" for Consul by its environment variables (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, …).
	// file://DIR is a watched directory, by its absolute path. It is created if it is missing, unless Existing is set.
	URL string
	// Prefix is the prefix of all keys in Consul; empty: kv.DefaultPrefix. A directory has none.
	Prefix string
	// Existing makes Store refuse a directory that doesn't exist. It has no effect on Consul.
	Existing bool
	Log      *slog.Logger // nil: discard
}

// Store opens the store that c names, without waiting for it to be reachable. It returns a kv.ConfigError if URL or
// Prefix is invalid. A token file that is missing or empty is an error. Consul would take a request without a token for
// an anonymous one, to which everything looks deleted.
func Store(c Config) (kv.Store, error) {
	if c.URL == "" || c.URL == "consul" {
		return consul.Open(consul.Config{Prefix: c.Prefix, Log: c.Log})
	}
	// The path is taken literally: % and # stand for themselves.
	path, ok := strings.CutPrefix(c.URL, "file://")
	if !ok {
		return nil, kv.ConfigError{
			Err: fmt.Errorf("open the store %q: want consul or file:///DIR", deployments.ShownURL(c.URL)),
		}
	}
	if !filepath.IsAbs(path) {
		return nil, kv.ConfigError{
			Err: fmt.Errorf("open the store %q: the directory must be absolute, as in file:///var/lib/kedge-kv", c.URL),
		}
	}
	switch info, err := os.Stat(path); { // a symbolic link is fine
	case !c.Existing:
	case err != nil:
		return nil, fmt.Errorf("open the store %q: %w", c.URL, err)
	case !info.IsDir():
		return nil, fmt.Errorf("open the store %q: it is not a directory", c.URL)
	}
	return dir.Open(path, c.Log)
}
