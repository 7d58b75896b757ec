package consul

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
)

// nodeMaintenance is the ID of the check that keeps a node in maintenance mode. The check's notes are the reason.
const nodeMaintenance = "_node_maintenance"

func (s *Store) SetMaintenance(ctx context.Context, on bool, reason string) error {
	if on && !strings.HasPrefix(reason, kv.MaintenanceReason) {
		return fmt.Errorf("maintenance mode: the reason %q does not begin with %q", reason, kv.MaintenanceReason)
	}
	return s.do(ctx, "switch the node's maintenance mode", requestTimeout, func(q *api.QueryOptions) error {
		// These calls take no options, so the client itself gets the current token and the remaining time.
		config := s.config
		config.Token = q.Token
		config.HttpClient = &http.Client{Transport: contextTransport{q.Context(), s.http.Transport}}
		client, err := api.NewClient(&config)
		if err != nil {
			return err
		}
		checks, err := client.Agent().ChecksWithFilterOpts(fmt.Sprintf("CheckID == %q", nodeMaintenance), q)
		if err != nil {
			return err
		}
		is, found := checks[nodeMaintenance]
		switch {
		case on == found, found && !strings.HasPrefix(is.Notes, kv.MaintenanceReason):
			return nil
		case on:
			return client.Agent().EnableNodeMaintenance(reason)
		}
		return client.Agent().DisableNodeMaintenance()
	})
}

// contextTransport is a transport that ends requests with a given context.
type contextTransport struct {
	ctx  context.Context
	next http.RoundTripper
}

func (w contextTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	return w.next.RoundTrip(r.WithContext(w.ctx))
}
