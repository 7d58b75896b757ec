package kv

import (
	"context"
	"crypto/rand"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

const (
	// LeaseService is the service that a lease's holder registers at its Consul agent while it holds it; the token needs service:write
	// for it. It tells people where the holder runs, and its check ends a dead holder's lease.
	LeaseService = "kedge-mirror"
	// heartbeatTTL is how long a holder may be silent. A session's own TTL is 10 s at least, and Consul waits for up to twice that.
	heartbeatTTL   = 5 * time.Second
	heartbeatEvery = time.Second
	// heartbeatMargin is by how much a holder that is cut off ends before its check does.
	heartbeatMargin = time.Second
)

// heartbeat is a registered service with a check that its own agent turns critical when it isn't told otherwise for heartbeatTTL.
// What is left of one whose process died, the agent removes after a minute.
type heartbeat struct {
	store *consulStore
	id    string // of the service and of its check

	mu     sync.Mutex
	beaten time.Time // when the last beat that was taken was sent
}

// left is how long its holder may rely on the check.
func (h *heartbeat) left() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return heartbeatTTL - heartbeatMargin - elapsed(h.beaten)
}

func (h *heartbeat) beat(at time.Time) {
	h.mu.Lock()
	h.beaten = at
	h.mu.Unlock()
}

// startHeartbeat registers one. ErrDenied: the token may not.
func (s *consulStore) startHeartbeat(ctx context.Context) (*heartbeat, error) {
	h := &heartbeat{store: s, id: LeaseService + "-" + rand.Text()[:8], beaten: time.Now()}
	return h, s.do(ctx, "register the service "+LeaseService, requestTimeout, func(q *api.QueryOptions) error {
		return s.client.Agent().ServiceRegisterOpts(&api.AgentServiceRegistration{ID: h.id, Name: LeaseService, Check: &api.AgentServiceCheck{
			CheckID: h.id, Name: "holds kedge's lease", TTL: heartbeatTTL.String(), Status: api.HealthPassing, DeregisterCriticalServiceAfter: "1m",
		}}, api.ServiceRegisterOpts{Token: q.Token}.WithContext(q.Context()))
	})
}

// keep says that the holder is alive, until ctx ends.
func (h *heartbeat) keep(ctx context.Context) {
	for wait(ctx, heartbeatEvery) == nil {
		asked := time.Now()
		err := h.store.do(ctx, "heartbeat", heartbeatTTL/2, func(q *api.QueryOptions) error {
			return h.store.client.Agent().UpdateTTLOpts(h.id, "", api.HealthPassing, q)
		})
		if err == nil {
			h.beat(asked)
		} else if ctx.Err() == nil {
			h.store.log.Debug("a heartbeat was not taken", "service", h.id, "error", err)
		}
	}
}

// stop deregisters it, as well as it can.
func (h *heartbeat) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := h.store.do(ctx, "deregister the service "+h.id, requestTimeout, func(q *api.QueryOptions) error {
		return h.store.client.Agent().ServiceDeregisterOpts(h.id, q)
	})
	if err != nil {
		h.store.log.Debug("a service stays behind for a minute", "service", h.id, "error", err)
	}
}

// session makes a session that ends with the heartbeat, too. The agent tells the servers of a new check in its own time.
func (h *heartbeat) session(ctx context.Context, e api.SessionEntry) (id string, err error) {
	e.NodeChecks, e.ServiceChecks = []string{"serfHealth"}, []api.ServiceCheck{{ID: h.id}}
	for began := time.Now(); ; {
		err := h.store.do(ctx, "create a session", requestTimeout, func(q *api.QueryOptions) error {
			id, _, err = h.store.client.Session().Create(&e, writeOptions(q))
			return err
		})
		if err == nil || !strings.Contains(err.Error(), "heck") || time.Since(began) > heartbeatTTL/2 {
			return id, err
		}
		if err := wait(ctx, 20*time.Millisecond); err != nil {
			return "", err
		}
	}
}
