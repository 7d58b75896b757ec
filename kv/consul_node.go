package kv

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"

	"github.com/hashicorp/consul/api"
)

// Namer is a Store with an agent on each node, which has a name for it.
type Namer interface {
	// NodeName is what the agent on this machine calls it; empty where the store is asked through another machine's, or a server. It
	// needs agent:read for that node, which no other call here does: ErrDenied without.
	NodeName(ctx context.Context) (string, error)
}

// ErrTokenUnknown is an ErrDenied: this machine's agent doesn't know the token. Of one that is new it remembers that for half a minute,
// while the servers, which the keys are read from, know it already.
var ErrTokenUnknown = fmt.Errorf("unknown token: %w", ErrDenied)

func (s *consulStore) NodeName(ctx context.Context) (string, error) {
	if !s.local {
		return "", nil
	}
	var self struct{ Config struct{ NodeName string } }
	err := s.do(ctx, "ask Consul's agent for its name", requestTimeout, func(q *api.QueryOptions) error {
		_, err := s.client.Raw().Query("/v1/agent/self", &self, q)
		return err
	})
	if errors.Is(err, ErrDenied) && strings.Contains(err.Error(), "ACL not found") {
		err = fmt.Errorf("%w: %w", ErrTokenUnknown, err)
	}
	return self.Config.NodeName, err
}

// isLocal reports whether an address, as Consul's client takes it, is this machine's own.
func isLocal(address string) bool {
	if strings.HasPrefix(address, "unix://") {
		return true
	}
	if !strings.Contains(address, "://") {
		address = "tcp://" + address
	}
	u, err := url.Parse(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
}
