package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
)

// requestTimeout bounds a request that doesn't block. Consul itself may hold one for 7 s while it has no leader.
const requestTimeout = 15 * time.Second

// consistent makes a read consistent: the leader answers only after a majority has confirmed that it leads, and after
// it has applied its log. Every read that decides something needs this. A leader that was just elected answers a
// default read while it still replays the log, with values long replaced. In one restart, Consul 1.22 showed records
// that were ten generations old, and keys deleted long ago.
//
// It costs a fifth more than a default read, as concurrent readers share one confirmation. Three servers and 64 readers
// on two cores gave 4,240 a second against 4,960, and 8,330 by stale reads on a follower. The 20,000 reads with which
// 10,000 agents start again after an outage take some 5 s of such servers. The watches' backoff spreads them over 6 s.
func consistent(q *api.QueryOptions) *api.QueryOptions {
	q.RequireConsistent = true
	return q
}

func writeOptions(q *api.QueryOptions) *api.WriteOptions {
	return (&api.WriteOptions{Token: q.Token}).WithContext(q.Context())
}

// do makes one request with the current token. As long as that is refused and the token file has another token, it
// repeats the request. This is safe for writes too, as a refused request changes nothing.
func (s *Store) do(
	ctx context.Context,
	what string,
	timeout time.Duration,
	request func(*api.QueryOptions) error,
) error {
	token, tokenErr := s.tokens.get()
	if tokenErr != nil {
		s.log.Error("could not read the token file: the last token stays in use", "error", tokenErr)
	}
	for {
		reqCtx, cancel := context.WithTimeout(ctx, timeout)
		err := classify(ctx, request((&api.QueryOptions{Token: token}).WithContext(reqCtx)))
		cancel()
		if err == nil {
			return nil
		}
		if errors.Is(err, kv.ErrDenied) {
			if again := s.tokens.reread(); again != token {
				token = again
				continue
			}
		}
		return fmt.Errorf("%s: %w", what, err)
	}
}

// classify wraps an error of Consul's client in the kv error that callers branch on. The end of ctx and Consul's
// refusal of a malformed request stay unwrapped.
func classify(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{kv.ErrNotFound, kv.ErrConflict, kv.ErrDenied, kv.ErrLeaseLost, kv.ErrUnavailable, kv.ErrTooLarge} {
		if errors.Is(err, known) {
			return err
		}
	}
	// The client counts a cancelled request as retryable, so this comes first.
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var status api.StatusError
	if !errors.As(err, &status) {
		return fmt.Errorf("%w: %w", kv.ErrUnavailable, err)
	}
	switch status.Code {
	case http.StatusForbidden, http.StatusUnauthorized:
		return fmt.Errorf("%w: %w", kv.ErrDenied, err)
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", kv.ErrNotFound, err)
	case http.StatusRequestEntityTooLarge:
		return fmt.Errorf("%w: %w", kv.ErrTooLarge, err)
	case http.StatusBadRequest, http.StatusMethodNotAllowed:
		return err
	default: // 429 and 503 are rate limits; 500 is mostly a missing leader
		return fmt.Errorf("%w: %w", kv.ErrUnavailable, err)
	}
}
