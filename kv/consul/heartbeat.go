package consul

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/internal/backend"
)

const (
	// LeaseService is the service that a lease's holder registers at its Consul agent. It shows people where the holder
	// runs, and its check ends a dead holder's lease. The token needs service:write for it.
	LeaseService = "kedge-mirror"
	// PresenceService is the service of a presence's process; its check shows that the process lives.
	// The service is registered only if the token has service:write for it. Without the service, a
	// node whose process died counts as live. Heartbeats go to the local agent alone, and cost the
	// servers nothing.
	PresenceService = "kedge-agent"
	// heartbeatMargin is how long before the end of its check's TTL a holder that is cut off gives
	// up its lease.
	heartbeatMargin = time.Second
)

// heartbeatKind distinguishes the heartbeat of a lease from that of a presence.
type heartbeatKind struct {
	service, check string
	// ttl is how long the process may be silent before the check fails, and every is the time between two heartbeats.
	ttl, every time.Duration
}

var (
	// leaseHeartbeat frees a dead holder's lease within seconds. By the session's own TTL, which is
	// at least 10 s and which Consul may double, the fleet would be without a mirror for longer.
	leaseHeartbeat = heartbeatKind{LeaseService, "holds kedge's lease", 5 * time.Second, time.Second}
	// presenceHeartbeat has a TTL longer than a killed agent takes to start again, so that its node
	// doesn't count as dead meanwhile. An agent that stops in order ends its heartbeat itself.
	presenceHeartbeat = heartbeatKind{PresenceService, "kedge's agent lives", 30 * time.Second, 5 * time.Second}
)

// heartbeat is a service at the Consul agent with a check that turns critical when it gets no heartbeat for its
// TTL. The agent removes the service of a dead process about a minute later.
type heartbeat struct {
	heartbeatKind
	store *Store
	id    string // the ID of the service and of its check

	mu     sync.Mutex
	beaten time.Time // when the last heartbeat that succeeded was sent
}

// left returns for how much longer the holder may rely on the check. If it is 0 or less, the holder must not.
func (h *heartbeat) left() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ttl - heartbeatMargin - elapsed(h.beaten)
}

func (h *heartbeat) beat(at time.Time) {
	h.mu.Lock()
	h.beaten = at
	h.mu.Unlock()
}

// startHeartbeat registers a heartbeat's service. The caller must run keep, which sends the heartbeats. If the token
// lacks service:write, the error is ErrDenied.
func (s *Store) startHeartbeat(ctx context.Context, kind heartbeatKind) (*heartbeat, error) {
	h := &heartbeat{heartbeatKind: kind, store: s, id: kind.service + "-" + rand.Text()[:8]}
	err := h.register(ctx)
	if err != nil && !errors.Is(err, kv.ErrDenied) {
		h.stop() // the agent may have registered it and answered too late
	}
	return h, err
}

// register registers the service with its check passing.
func (h *heartbeat) register(ctx context.Context) error {
	asked := time.Now()
	err := h.store.do(ctx, "register the service "+h.service, requestTimeout, func(q *api.QueryOptions) error {
		service := &api.AgentServiceRegistration{ID: h.id, Name: h.service, Check: &api.AgentServiceCheck{
			CheckID: h.id, Name: h.check, TTL: h.ttl.String(), Status: api.HealthPassing, DeregisterCriticalServiceAfter: "1m",
		}}
		return h.store.client.Agent().
			ServiceRegisterOpts(service, api.ServiceRegisterOpts{Token: q.Token}.WithContext(q.Context()))
	})
	if err == nil {
		h.beat(asked)
	}
	return err
}

const (
	// maxStrayed is how many heartbeats must reach an agent that doesn't know the service before the address counts as
	// one of several agents. A single such heartbeat means an agent that restarted without its data, or a process that
	// was suspended for so long that the agent removed the service.
	maxStrayed = 2
	// strayWindow is the time within which maxStrayed heartbeats must reach such agents. Behind a
	// balancer that takes a minute or so.
	strayWindow = 10 * time.Minute
)

// strays are the times of the last maxStrayed heartbeats that reached an agent which didn't know the service.
type strays struct {
	mu    sync.Mutex
	times [maxStrayed]time.Time // oldest first
}

func (s *strays) add(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(s.times[:], s.times[1:])
	s.times[maxStrayed-1] = at
}

// allRecent reports whether all of the times are within the last strayWindow.
func (s *strays) allRecent() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return elapsed(s.times[0]) < strayWindow
}

// errStrayed means that a lease can't depend on a heartbeat's check, as heartbeats don't always
// reach that check's agent.
var errStrayed = errors.New(
	"heartbeats seem to reach several Consul agents behind one address: point CONSUL_HTTP_ADDR at one agent",
)

// keep sends heartbeats until ctx ends. If the Consul agent doesn't know the service, keep
// registers it again, and adds the heartbeat to Store.strayed.
func (h *heartbeat) keep(ctx context.Context) {
	var causes backend.Causes
	lost := false // the service isn't known to have been registered since the last heartbeat that strayed
	for wait.For(ctx, h.every) == nil {
		asked := time.Now()
		err := h.store.do(ctx, "heartbeat", h.ttl/2, func(q *api.QueryOptions) error {
			return h.store.client.Agent().UpdateTTLOpts(h.id, "", api.HealthPassing, q)
		})
		switch {
		case err == nil:
			causes.FirstOfKind(nil)
			lost = false
			h.beat(asked)
		case ctx.Err() != nil:
			return
		case errors.Is(err, kv.ErrNotFound): // the Consul agent lost the service, or another agent answered
			if !lost { // an agent that lost the service and can't register it again yet counts once
				h.store.strayed.add(asked)
			}
			lost = true
			if err := h.register(ctx); err != nil {
				h.store.log.Warn("could not register the service anew after the Consul agent had lost it: trying again",
					"service", h.id, "error", err)
			} else {
				lost = false
				h.store.log.Info("registered the service anew after the Consul agent had lost it", "service", h.id)
			}
		case causes.FirstOfKind(err):
			h.store.log.Warn("could not send the heartbeat to the Consul agent: trying again", "service", h.id, "error", err)
		}
	}
}

// stop deregisters the service. If that fails, the Consul agent removes it after a minute.
func (h *heartbeat) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := h.store.do(ctx, "deregister the service "+h.id, requestTimeout, func(q *api.QueryOptions) error {
		return h.store.client.Agent().ServiceDeregisterOpts(h.id, q)
	})
	if err != nil {
		h.store.log.Debug("could not deregister the service, which the Consul agent removes after a minute",
			"service", h.id, "error", err)
	}
}

// newSession creates a session that ends with the heartbeat, and with the node's health. If a check
// is missing, newSession tries again for retryFor, as the Consul agent delays telling the
// servers of a new check.
func (h *heartbeat) newSession(ctx context.Context, e api.SessionEntry, retryFor time.Duration) (id string, err error) {
	e.NodeChecks, e.ServiceChecks = []string{"serfHealth"}, []api.ServiceCheck{{ID: h.id}}
	for began := time.Now(); ; {
		err := h.store.do(ctx, "create a session", requestTimeout, func(q *api.QueryOptions) error {
			id, _, err = h.store.client.Session().Create(&e, writeOptions(q))
			return err
		})
		if err == nil || !missesCheck(err) || time.Since(began) > retryFor {
			return id, err
		}
		if err := wait.For(ctx, 20*time.Millisecond); err != nil {
			return "", err
		}
	}
}

// missesCheck reports whether newSession failed because the servers don't know the check. Consul
// answers that with the same status as a failure of its own, so the text decides.
func missesCheck(err error) bool {
	var status api.StatusError // not the whole error: an address or a certificate may name a check, too
	return errors.As(err, &status) && strings.Contains(status.Body, "heck")
}
