package consul

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
)

func (s *Store) NodeName(ctx context.Context) (string, error) {
	if !s.loopback {
		return "", nil
	}
	var self struct{ Config struct{ NodeName string } }
	err := s.do(ctx, "ask Consul's agent for its name", requestTimeout, func(q *api.QueryOptions) error {
		_, err := s.client.Raw().Query("/v1/agent/self", &self, q)
		return err
	})
	if errors.Is(err, kv.ErrDenied) && strings.Contains(err.Error(), "ACL not found") {
		err = fmt.Errorf("%w: %w", kv.ErrTokenUnknown, err)
	}
	return self.Config.NodeName, err
}

// isLoopback reports whether an address, as Consul's client takes it, is a Unix socket's or a loopback address. This
// machine's other addresses count as another's.
func isLoopback(address string) bool {
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

func (s *Store) Datacenter(ctx context.Context) (string, error) {
	if s.config.Datacenter != "" {
		return s.config.Datacenter, nil
	}
	var all []string
	err := s.do(ctx, "ask for the datacenters", requestTimeout, func(q *api.QueryOptions) error {
		_, err := s.client.Raw().Query("/v1/catalog/datacenters", &all, q)
		return err
	})
	if err != nil || len(all) == 0 {
		return "", err
	}
	return all[0], nil // nearest first: the datacenter that answers
}
