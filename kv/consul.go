package kv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"
)

// requestTimeout bounds one request that doesn't block. Consul itself holds a request for up to 7 s while it looks for a leader.
const requestTimeout = 15 * time.Second

// consulStore is the Store in Consul KV.
type consulStore struct {
	client *api.Client
	config api.Config // the client's, with its HTTP client
	tokens *tokenSource
	addr   string // for people
	local  bool   // addr is this machine's own
	// earlierAfter is a presence's.
	earlierAfter time.Duration
	// strayed counts beats that reached a Consul agent which did not know the service: see heartbeat.keep.
	strayed atomic.Int32
	prefix  string // ends in "/"
	log     *slog.Logger
	http    *http.Client
}

func openConsul(c Config) (*consulStore, error) {
	config := api.DefaultConfig()
	if c.Consul != nil {
		explicit := *c.Consul
		if explicit.Token == "" && explicit.TokenFile == "" {
			explicit.Token, explicit.TokenFile = config.Token, config.TokenFile
		}
		config = &explicit
	}
	tokens, err := newTokenSource(config.Token, config.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("open consul: %w", err)
	}
	// Each request gives its token, so that it can change: the client reads a token file once.
	config.TokenFile = ""
	config.Token, _ = tokens.get()
	local := isLocal(cmp.Or(config.Address, api.DefaultConfig().Address))
	client, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("open consul: %w", err)
	}
	prefix := c.Prefix
	if prefix == "" {
		prefix = DefaultPrefix
	}
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	if err := checkPrefix(prefix); err != nil {
		return nil, ConfigError{fmt.Errorf("open consul: the prefix %q: %w", prefix, err)}
	}
	// NewClient filled in the address, the scheme and the HTTP client.
	addr := config.Address
	if !strings.Contains(addr, "://") {
		addr = config.Scheme + "://" + addr
	}
	return &consulStore{client: client, config: *config, tokens: tokens, addr: addr, local: local, earlierAfter: earlierAfter, prefix: prefix, log: c.Log, http: config.HttpClient}, nil
}

func (s *consulStore) String() string {
	return fmt.Sprintf("consul at %s, prefix %s", s.addr, s.prefix)
}

func (s *consulStore) Close() error {
	s.http.CloseIdleConnections()
	return nil
}

func (s *consulStore) Get(ctx context.Context, key string) (Entry, error) {
	if err := checkKey(key); err != nil {
		return Entry{}, err
	}
	var entry Entry
	err := s.do(ctx, "get "+key, requestTimeout, func(q *api.QueryOptions) error {
		pair, _, err := s.client.KV().Get(s.prefix+key, consistent(q))
		if err != nil {
			return err
		}
		if pair == nil {
			return ErrNotFound
		}
		entry = s.entry(pair)
		return nil
	})
	return entry, err
}

func (s *consulStore) List(ctx context.Context, prefix string) ([]Entry, error) {
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	l, err := s.certain(ctx, prefix)
	if err != nil {
		return nil, err
	}
	if l.filtered || !l.folder && len(l.entries) == 0 {
		return nil, s.absenceError(prefix)
	}
	return l.entries, nil
}

// listing is one answer about a prefix.
type listing struct {
	entries []Entry // sorted
	// folder is whether the prefix's own key is among them. Without it a missing key may be one that the token
	// can't see: Consul answers both alike.
	folder bool
	// filtered is whether Consul says that it left out what the token may not read.
	filtered bool
	meta     *api.QueryMeta
}

// read lists a prefix once. Not even a folder key says nothing about absence.
func (s *consulStore) read(ctx context.Context, prefix string, opts api.QueryOptions, timeout time.Duration) (listing, error) {
	var l listing
	err := s.do(ctx, "list "+prefix, timeout, func(q *api.QueryOptions) error {
		opts.Token = q.Token
		pairs, meta, err := s.client.KV().List(s.prefix+prefix, opts.WithContext(q.Context()))
		if err != nil {
			return err
		}
		l = listing{meta: meta, filtered: meta.ResultsFilteredByACLs}
		for _, p := range pairs {
			switch {
			case p.Key == s.prefix+prefix:
				l.folder = true
			case strings.HasSuffix(p.Key, "/"):
			default:
				l.entries = append(l.entries, s.entry(p))
			}
		}
		sortEntries(l.entries)
		return nil
	})
	return l, err
}

func (s *consulStore) absenceError(prefix string) error {
	return &absentError{prefix: prefix, folder: s.prefix + prefix}
}

// absentError wraps ErrDenied, and is ErrNoFolder: it may be that nothing was written yet.
type absentError struct{ prefix, folder string }

func (e *absentError) Error() string {
	return fmt.Sprintf("list %s: the answer hasn't the folder key %s: the token may not read it, or no mirror has created it yet: %v", e.prefix, e.folder, ErrDenied)
}

func (e *absentError) Is(target error) bool { return target == ErrDenied || target == ErrNoFolder }

func (s *consulStore) entry(p *api.KVPair) Entry {
	return Entry{Key: strings.TrimPrefix(p.Key, s.prefix), Value: p.Value, Version: p.ModifyIndex, Session: p.Session}
}

func (s *consulStore) EnsureFolders(ctx context.Context, prefixes ...string) error {
	for _, prefix := range prefixes {
		if err := checkPrefix(prefix); err != nil {
			return err
		}
		err := s.do(ctx, "create the folder "+prefix, requestTimeout, func(q *api.QueryOptions) error {
			// Looked up first: a write that changes nothing still costs the servers a round of consensus.
			pair, _, err := s.client.KV().Get(s.prefix+prefix, consistent(q))
			if err != nil || pair != nil {
				return err
			}
			_, _, err = s.client.KV().CAS(&api.KVPair{Key: s.prefix + prefix}, writeOptions(q))
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// consistent makes a read that something is decided by: the leader answers only after a majority has
// confirmed that it leads, and after it has applied its log. A default read is no confirmation. A leader
// that was just elected answers those while it replays the log, with values long replaced (Consul 1.22:
// 10 generations in one restart, keys deleted long ago among them).
func consistent(q *api.QueryOptions) *api.QueryOptions {
	q.RequireConsistent = true
	return q
}

func writeOptions(q *api.QueryOptions) *api.WriteOptions {
	return (&api.WriteOptions{Token: q.Token}).WithContext(q.Context())
}

// do makes one request with the token of the moment, and once more if that was refused and the token file holds
// another by now. A refused request has changed nothing, so this is safe for writes too.
func (s *consulStore) do(ctx context.Context, what string, timeout time.Duration, request func(*api.QueryOptions) error) error {
	token, tokenErr := s.tokens.get()
	if tokenErr != nil {
		s.log.Error("the token file can't be used, so the last token stays", "error", tokenErr)
	}
	for {
		reqCtx, cancel := context.WithTimeout(ctx, timeout)
		err := consulError(ctx, request((&api.QueryOptions{Token: token}).WithContext(reqCtx)))
		cancel()
		if err == nil {
			return nil
		}
		if errors.Is(err, ErrDenied) {
			if again := s.tokens.reread(); again != token {
				token = again
				continue
			}
		}
		return fmt.Errorf("%s: %w", what, err)
	}
}

// consulError gives an error of Consul's client the sentinel that says what to do about it.
func consulError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{ErrNotFound, ErrConflict, ErrDenied, ErrLeaseLost, ErrUnavailable, ErrTooLarge} {
		if errors.Is(err, known) {
			return err
		}
	}
	// The client calls a cancelled request retryable, so this comes first.
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var status api.StatusError
	if !errors.As(err, &status) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	switch status.Code {
	case http.StatusForbidden, http.StatusUnauthorized:
		return fmt.Errorf("%w: %w", ErrDenied, err)
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case http.StatusRequestEntityTooLarge:
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	case http.StatusBadRequest, http.StatusMethodNotAllowed:
		return err
	default: // 429 and 503 limit rates; 500 is mostly a missing leader
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
}
