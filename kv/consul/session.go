package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
)

// errNoHealthCheck means that the node whose Consul agent answers has no serfHealth check to tie a session to.
var errNoHealthCheck = errors.New("the node has no serfHealth check")

// createSession creates a session. With a TTL it depends on no check. Without a TTL it is tied to the health of the
// node whose Consul agent answers. If that node has no serfHealth check, the error is errNoHealthCheck.
func (s *Store) createSession(ctx context.Context, e *api.SessionEntry) (id string, err error) {
	err = s.do(ctx, "create a session", requestTimeout, func(q *api.QueryOptions) error {
		if e.TTL != "" {
			// A session without named checks would be tied to serfHealth of the node whose agent answers. It would end
			// with that node, which may be a server.
			id, _, err = s.client.Session().CreateNoChecks(e, writeOptions(q))
			return err
		}
		id, _, err = s.client.Session().Create(e, writeOptions(q))
		if err != nil && strings.Contains(err.Error(), "Missing check") {
			return errNoHealthCheck
		}
		return err
	})
	if err == nil && id == "" {
		err = fmt.Errorf("create a session: Consul returned no session ID: %w", kv.ErrUnavailable)
	}
	return id, err
}

// destroySession ends a session. An error is only logged, as the session ends with its TTL, its check or its node.
func (s *Store) destroySession(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := s.do(ctx, "destroy a session", requestTimeout, func(q *api.QueryOptions) error {
		_, err := s.client.Session().Destroy(id, writeOptions(q))
		return err
	})
	if err != nil {
		s.log.Debug("could not destroy the session", "session", id, "error", err)
	}
}

// renewSession extends a session that has a TTL. If the session is gone, the error is ErrNotFound.
func (s *Store) renewSession(ctx context.Context, id string, timeout time.Duration) error {
	return s.do(ctx, "renew a session", timeout, func(q *api.QueryOptions) error {
		_, err := s.client.Raw().Write("/v1/session/renew/"+id, nil, nil, writeOptions(q))
		var status api.StatusError
		if errors.As(err, &status) && status.Code == http.StatusNotFound {
			return kv.ErrNotFound
		}
		return err
	})
}

// sessionInfo returns a session and the index to wait on. If the session is gone, e is nil, without an error.
func (s *Store) sessionInfo(
	ctx context.Context,
	id string,
	opts api.QueryOptions,
	timeout time.Duration,
) (e *api.SessionEntry, index uint64, err error) {
	err = s.do(ctx, "look at a session", timeout, func(q *api.QueryOptions) error {
		opts.Token = q.Token
		var meta *api.QueryMeta
		if e, meta, err = s.client.Session().Info(id, opts.WithContext(q.Context())); err == nil {
			index = meta.LastIndex
		}
		return err
	})
	return e, index, err
}
