package kv

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/consul/api"
)

// Maintainer is a Store beside which services are registered, so that a node can be taken out of service.
type Maintainer interface {
	// Maintain turns the maintenance mode of the node on or off. A mode that somebody else turned on, for a reason that doesn't begin
	// with MaintenanceReason, is left as it is, and is no error. Needs node:write for the node, which no other call here does.
	Maintain(ctx context.Context, on bool, reason string) error
}

// MaintenanceReason begins the reason of every maintenance that kedge turned on, also in a run before this one.
const MaintenanceReason = "kedge "

// nodeMaintenance is the check by which Consul keeps a node in maintenance mode; its notes are the reason.
const nodeMaintenance = "_node_maintenance"

func (s *consulStore) Maintain(ctx context.Context, on bool, reason string) error {
	if on && !strings.HasPrefix(reason, MaintenanceReason) {
		return fmt.Errorf("maintenance mode: the reason %q does not begin with %q", reason, MaintenanceReason)
	}
	return s.do(ctx, "maintenance mode", requestTimeout, func(q *api.QueryOptions) error {
		// These calls take no options of their own, so the client gets the token of now, and the time that is left.
		config := s.config
		config.Token = q.Token
		config.HttpClient = &http.Client{Transport: within{q.Context(), s.http.Transport}}
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
		case on == found, found && !strings.HasPrefix(is.Notes, MaintenanceReason):
			return nil
		case on:
			return client.Agent().EnableNodeMaintenance(reason)
		}
		return client.Agent().DisableNodeMaintenance()
	})
}

// within ends requests with a context of its own.
type within struct {
	ctx  context.Context
	next http.RoundTripper
}

func (w within) RoundTrip(r *http.Request) (*http.Response, error) {
	return w.next.RoundTrip(r.WithContext(w.ctx))
}
