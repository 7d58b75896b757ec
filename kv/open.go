package kv

import (
	"context"
	"errors"
	"log/slog"

	"github.com/hashicorp/consul/api"
)

// Config opens a store. The zero value is Consul by its own environment variables, with DefaultPrefix.
type Config struct {
	// URL is empty or "consul" for Consul as its environment (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, …) says, or
	// file://DIR for a watched directory, which is made if it is missing.
	URL string
	// Prefix of all keys in Consul; empty: DefaultPrefix. A directory has none.
	Prefix string
	// Consul is the client's configuration where the environment's isn't meant; fields that are left out come from
	// the environment.
	Consul *api.Config
	Log    *slog.Logger // nil: discard
}

// Open opens the store that c names. It does not wait for it to be reachable.
func Open(ctx context.Context, c Config) (Store, error) { return nil, errors.New("not yet") }
