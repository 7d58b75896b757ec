package kv

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/consul/api"
)

// Config opens a store. The zero value is Consul by its own environment variables, with DefaultPrefix.
type Config struct {
	// URL is empty or "consul" for Consul as its environment (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, …) says, or
	// file://DIR for a watched directory, which is made if it is missing, unless it has to be Existing.
	URL string
	// Prefix of all keys in Consul; empty: DefaultPrefix. A directory has none.
	Prefix string
	// Existing refuses a directory that isn't there.
	Existing bool
	// Consul is the client's configuration where the environment's isn't meant. Fields that are left out come from
	// the environment.
	Consul *api.Config
	Log    *slog.Logger // nil: discard
}

// ConfigError is Open's for a Config that names no store: whoever typed it has to.
type ConfigError struct{ err error }

func (e ConfigError) Error() string { return e.err.Error() }
func (e ConfigError) Unwrap() error { return e.err }

// Open opens the store that c names. It does not wait for it to be reachable. A token file that is missing or empty
// is an error: Consul would take the lack of a token for an anonymous one, to whom everything looks deleted.
func Open(_ context.Context, c Config) (Store, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.URL == "" || c.URL == "consul" {
		return openConsul(c)
	}
	// Taken as it stands: to whoever types it, it is a path, in which % and # are themselves.
	dir, ok := strings.CutPrefix(c.URL, "file://")
	if !ok {
		return nil, ConfigError{fmt.Errorf("open the store %q: want consul or file:///DIR", c.URL)}
	}
	if !filepath.IsAbs(dir) {
		return nil, ConfigError{fmt.Errorf("open the store %q: the directory must be absolute, as in file:///var/lib/kedge-kv", c.URL)}
	}
	if info, err := os.Stat(dir); c.Existing && (err != nil || !info.IsDir()) { // it may be a link
		return nil, fmt.Errorf("open the store %q: there is no such directory", c.URL)
	}
	return openDir(dir, c.Log)
}
