// Package consul keeps kv's contract in Consul.
//
// Reads that wait are stale ones, which any server answers; all that decide are consistent ones. The token is given
// per request, and a token file is read again when it changes and after a refusal. A lease is a session with a TTL
// that is renewed every third of it. A presence is a session on the health of the node that the local Consul agent
// runs on and on a check of its process, if that node has the presence's name, so that a fleet's liveness costs no
// writes; else it has a TTL of 30 s.
package consul

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/internal/backend"
)

// Store is a kv.Store in Consul KV.
type Store struct {
	client *api.Client
	config api.Config // the client's, with its HTTP client
	tokens *tokenSource
	addr   string // for people
	local  bool   // addr is this machine's own
	// earlierAfter and presencePoll are a presence's.
	earlierAfter, presencePoll time.Duration
	// strayed counts beats that reached a Consul agent which did not know the service: see heartbeat.keep.
	strayed atomic.Int32
	prefix  string // ends in "/"
	log     *slog.Logger
	http    *http.Client
}

// Config opens a store. The zero value is Consul by its own environment variables, with kv.DefaultPrefix.
type Config struct {
	// Prefix of all keys; empty: kv.DefaultPrefix.
	Prefix string
	// Client is the client's configuration where the environment's isn't meant. Fields that are left out come from the
	// environment.
	Client *api.Config
	Log    *slog.Logger // nil: discard
}

// Open opens a store, without waiting for Consul to be reachable. kv.ConfigError means that the prefix can't be one. A
// token file that is missing or empty is an error, as Consul would take the lack of a token for an anonymous one.
func Open(c Config) (*Store, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	config := api.DefaultConfig()
	if c.Client != nil {
		explicit := *c.Client
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
	var transport *http.Transport
	if config.HttpClient == nil {
		transport = newTransport()
		config.Transport = transport
	}
	client, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("open consul: %w", err)
	}
	if transport != nil {
		// NewClient took what was left out of the files' names from the environment.
		certificates := &certificates{files: config.TLSConfig, log: c.Log}
		if err := certificates.follow(transport); err != nil {
			return nil, fmt.Errorf("open consul: %w", err)
		}
	}
	prefix := c.Prefix
	if prefix == "" {
		prefix = kv.DefaultPrefix
	}
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	if err := backend.CheckPrefix(prefix); err != nil {
		return nil, kv.ConfigError{Err: fmt.Errorf("open consul: the prefix %q: %w", prefix, err)}
	}
	// NewClient filled in the address, the scheme and the HTTP client.
	addr := config.Address
	if !strings.Contains(addr, "://") {
		addr = config.Scheme + "://" + addr
	}
	return &Store{
		client:       client,
		config:       *config,
		tokens:       tokens,
		addr:         addr,
		local:        local,
		earlierAfter: earlierAfter,
		presencePoll: presencePoll,
		prefix:       prefix,
		log:          c.Log,
		http:         config.HttpClient,
	}, nil
}

func (s *Store) String() string {
	return fmt.Sprintf("consul at %s, prefix %s", s.addr, s.prefix)
}

func (s *Store) Close() error {
	s.http.CloseIdleConnections()
	return nil
}

func (s *Store) Get(ctx context.Context, key string) (kv.Entry, error) {
	if err := backend.CheckKey(key); err != nil {
		return kv.Entry{}, err
	}
	var entry kv.Entry
	err := s.do(ctx, "get "+key, requestTimeout, func(q *api.QueryOptions) error {
		pair, _, err := s.client.KV().Get(s.prefix+key, consistent(q))
		if err != nil {
			return err
		}
		if pair == nil {
			return kv.ErrNotFound
		}
		entry = s.entry(pair)
		return nil
	})
	return entry, err
}

func (s *Store) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if err := backend.CheckPrefix(prefix); err != nil {
		return nil, err
	}
	l, err := s.certain(ctx, prefix)
	if err != nil {
		return nil, err
	}
	if l.filtered || !l.folder && len(l.entries) == 0 {
		return nil, &absentError{prefix: prefix, folder: s.prefix + prefix, empty: !l.filtered && s.mayRead(ctx, prefix)}
	}
	return l.entries, nil
}

// mayRead reports whether the folder key of a prefix is known to be absent: Consul refuses a read of one key to a token
// without the right, where it leaves the key out of a list. Servers before 1.4 answer both alike.
func (s *Store) mayRead(ctx context.Context, prefix string) bool {
	err := s.do(ctx, "get the folder "+prefix, requestTimeout, func(q *api.QueryOptions) error {
		_, _, err := s.client.KV().Get(s.prefix+prefix, consistent(q))
		return err
	})
	return err == nil
}

// listing is one answer to a read of a prefix.
type listing struct {
	entries []kv.Entry // sorted
	folders []string   // the folder keys below the prefix, sorted
	// folder is whether the prefix's own key is among them. Without it a missing key may be one that the token
	// can't see: Consul answers both alike.
	folder bool
	// filtered is whether Consul says that it left out what the token may not read.
	filtered bool
	meta     *api.QueryMeta
}

// read lists a prefix once. Not even a folder key says nothing about absence.
func (s *Store) read(
	ctx context.Context,
	prefix string,
	opts api.QueryOptions,
	timeout time.Duration,
) (listing, error) {
	var l listing
	err := s.do(ctx, "list "+prefix, timeout, func(q *api.QueryOptions) error {
		opts.Token = q.Token
		pairs, meta, err := s.client.KV().List(s.prefix+prefix, opts.WithContext(q.Context()))
		if err != nil {
			return err
		}
		l = listing{meta: meta, filtered: meta.ResultsFilteredByACLs, folders: []string{}}
		for _, p := range pairs {
			switch {
			case p.Key == s.prefix+prefix:
				l.folder = true
			case strings.HasSuffix(p.Key, "/"):
				l.folders = append(l.folders, strings.TrimPrefix(p.Key, s.prefix))
			default:
				l.entries = append(l.entries, s.entry(p))
			}
		}
		backend.SortEntries(l.entries)
		slices.Sort(l.folders)
		return nil
	})
	return l, err
}

func (s *Store) absenceError(prefix string) error {
	return &absentError{prefix: prefix, folder: s.prefix + prefix}
}

// absentError wraps ErrDenied, and is ErrNoFolder: it may be that nothing was written yet. It is ErrEmpty if the token
// may read the folder key, so that it is nothing else.
type absentError struct {
	prefix, folder string
	empty          bool
}

func (e *absentError) Error() string {
	if e.empty {
		return fmt.Sprintf("list %s: there is no %s: no mirror has created it yet", e.prefix, e.folder)
	}
	return fmt.Sprintf(
		"list %s: the answer lacks the folder key %s: the token may not read it, or no mirror has created it yet: %v",
		e.prefix,
		e.folder,
		kv.ErrDenied,
	)
}

func (e *absentError) Is(target error) bool {
	return target == kv.ErrDenied || target == kv.ErrNoFolder || target == kv.ErrEmpty && e.empty
}

func (s *Store) entry(p *api.KVPair) kv.Entry {
	return kv.Entry{Key: strings.TrimPrefix(p.Key, s.prefix), Value: p.Value, Version: p.ModifyIndex, Session: p.Session}
}

func (s *Store) EnsureFolders(ctx context.Context, prefixes ...string) error {
	for _, prefix := range prefixes {
		if err := backend.CheckPrefix(prefix); err != nil {
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
