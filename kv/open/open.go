// Package open opens the store that a URL names. It alone knows every implementation.
package open

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/dir"
)

// Config names a store. The zero value is Consul by its own environment variables, with kv.DefaultPrefix.
type Config struct {
	// URL is empty or "consul" for Consul as its environment (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, …) says, or
	// file://DIR for a watched directory, which is made if it is missing, unless it has to be Existing.
	URL string
	// Prefix of all keys in Consul; empty: kv.DefaultPrefix. A directory has none.
	Prefix string
	// Existing refuses a directory that isn't there.
	Existing bool
	Log      *slog.Logger // nil: discard
}

// Store opens the store that c names, without waiting for it to be reachable. kv.ConfigError means that c names none.
// A token file that is missing or empty is an error: Consul would take the lack of a token for an anonymous one, to
// whom everything looks deleted.
func Store(c Config) (kv.Store, error) {
	if c.URL == "" || c.URL == "consul" {
		return consul.Open(consul.Config{Prefix: c.Prefix, Log: c.Log})
	}
	// Taken as it stands: to whoever types it, it is a path, in which % and # are themselves.
	path, ok := strings.CutPrefix(c.URL, "file://")
	if !ok {
		return nil, kv.ConfigError{Err: fmt.Errorf("open the store %q: want consul or file:///DIR", c.URL)}
	}
	if !filepath.IsAbs(path) {
		return nil, kv.ConfigError{
			Err: fmt.Errorf("open the store %q: the directory must be absolute, as in file:///var/lib/kedge-kv", c.URL),
		}
	}
	if info, err := os.Stat(path); c.Existing && (err != nil || !info.IsDir()) { // it may be a link
		return nil, fmt.Errorf("open the store %q: there is no such directory", c.URL)
	}
	return dir.Open(path, c.Log)
}
