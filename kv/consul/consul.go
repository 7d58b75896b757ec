// Package consul implements kv's contract by Consul.
//
// Blocking reads of watches and presences are stale ones, which any server answers. Reads that decide something are
// consistent ones. Each request carries the current token: a token file is read again when it changes, and after a
// refusal. A lease is a session that is renewed every third of its TTL and, if possible, tied to a heartbeat.
//
// A presence is a session tied to its node's health and, if possible, to a check of the process, so that a fleet's
// liveness costs no writes. If the Consul agent's node has another name, or no serfHealth check, the session has a TTL
// of 30 s instead.
package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/internal/backend"
)

// Store is a kv.Store in Consul KV.
type Store struct {
	client *api.Client
	config api.Config // the client's configuration, with its HTTP client
	tokens *tokenSource
	addr   string // the address, for people
	// loopback is set if addr is a loopback address or a Unix socket.
	loopback bool
	// endOthersAfter and presenceCheckAfter are the constants of these names, which tests shorten.
	endOthersAfter, presenceCheckAfter time.Duration
	// strayed are heartbeats that reached a Consul agent which did not know the service: see heartbeat.keep.
	strayed strays
	prefix  string // ends in "/"
	log     *slog.Logger
	http    *http.Client
}

// Config configures a store. The zero value means Consul by its own environment variables, with kv.DefaultPrefix.
type Config struct {
	// Prefix is the prefix of all keys; empty: kv.DefaultPrefix.
	Prefix string
	// Client overrides the environment's configuration of the client. Zero fields but HttpAuth come from the environment.
	Client *api.Config
	Log    *slog.Logger // nil: discard
}

// CheckAddress returns an error unless an address, as in CONSUL_HTTP_ADDR, is HOST:PORT, http[s]://HOST[:PORT][/PATH]
// or unix:///PATH. Consul's client (v1.34.5) takes a user name, a password or a query for a part of the host's name or
// the path, and its errors show them. The error shows nothing of the address.
func CheckAddress(address string) error {
	scheme, rest, found := strings.Cut(address, "://")
	switch {
	case found && scheme == "unix" && strings.HasPrefix(rest, "/"):
		return nil
	case !found:
		rest = address
	}
	if strings.ContainsFunc(rest, unicode.IsSpace) || strings.ContainsAny(rest, `@?#"'`) {
		return errors.New("CONSUL_HTTP_ADDR has to be HOST:PORT or a URL, without a user name, password or query: " +
			"set CONSUL_HTTP_AUTH=USER:PASSWORD, or CONSUL_HTTP_TOKEN, instead")
	}
	if strings.Contains(rest, "//") || strings.HasPrefix(rest, "/") {
		return errors.New("CONSUL_HTTP_ADDR has to be HOST:PORT, http[s]://HOST[:PORT] or unix:///PATH")
	}
	return nil
}

// Open opens a store, without waiting for Consul. It returns a kv.ConfigError if the prefix is invalid, or the address
// doesn't pass CheckAddress. A token file that is missing or empty is an error, as Consul would take a request without
// a token for an anonymous one. So is a TLS file that can't be read.
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
		if explicit.HttpClient != nil {
			own := *explicit.HttpClient
			explicit.HttpClient = &own
		}
		config = &explicit
	}
	tokens, err := newTokenSource(config.Token, config.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("open consul: %w", err)
	}
	// Each request carries its own token, as the client would read the token file only once.
	config.TokenFile = ""
	config.Token, _ = tokens.get()
	if err := checkFiles(config.TLSConfig); err != nil {
		return nil, fmt.Errorf("open consul: %w", err)
	}
	address := cmp.Or(config.Address, api.DefaultConfig().Address) // NewClient takes it apart
	if err := CheckAddress(address); err != nil {
		return nil, kv.ConfigError{Err: fmt.Errorf("open consul: %w", err)}
	}
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
		// NewClient has filled in missing file names from the environment.
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
	// NewClient has filled in the scheme, the path prefix and the HTTP client, which is the one that it uses.
	config.HttpClient.Transport = answers{cmp.Or(config.HttpClient.Transport, http.DefaultTransport)}
	addr := config.Scheme + "://" + config.Address + strings.TrimSuffix(config.PathPrefix, "/")
	if strings.HasPrefix(address, "unix://") {
		addr = address
	}
	return &Store{
		client:             client,
		config:             *config,
		tokens:             tokens,
		addr:               addr,
		loopback:           isLoopback(address),
		endOthersAfter:     endOthersAfter,
		presenceCheckAfter: presenceCheckAfter,
		prefix:             prefix,
		log:                c.Log,
		http:               config.HttpClient,
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
	l, err := s.listConsistent(ctx, prefix)
	if err != nil {
		return nil, err
	}
	if l.filtered || !l.folder && len(l.entries) == 0 {
		absent := s.absenceError(prefix, l)
		absent.empty = !l.filtered && s.mayRead(ctx, prefix)
		return nil, absent
	}
	return l.entries, nil
}

// mayRead reports whether the token may read the folder key of a prefix, which a list lacked. It returns false, too, if
// Consul doesn't answer. Without the right, Consul refuses to read a single key, but leaves it out of a list without an
// error. Servers before 1.4 answer a read of a missing key and of a forbidden key alike.
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
	// folder reports whether the answer has the prefix's own key. If not, a missing key may be one that the token can't
	// see, as Consul leaves out both.
	folder bool
	// filtered reports whether Consul says that it left out entries that the token may not read.
	filtered bool
	meta     *api.QueryMeta
}

// read lists a prefix once. An answer without the prefix's folder key is no proof of absence. If
// there is more than a ListLimit takes, the error is a TooMuchError.
func (s *Store) read(
	ctx context.Context,
	prefix string,
	opts api.QueryOptions,
	timeout time.Duration,
) (listing, error) {
	var l listing
	err := s.do(ctx, "list "+prefix, timeout, func(q *api.QueryOptions) error {
		opts.Token = q.Token
		l = listing{folders: []string{}}
		limit := backend.NewListLimit(prefix)
		pairs := &pairReader{take: func(p *api.KVPair) error {
			e := s.entry(p)
			switch {
			case p.Key == s.prefix+prefix:
				l.folder = true
				return nil
			case strings.HasSuffix(p.Key, "/"):
				l.folders = append(l.folders, e.Key)
				e.Value = nil
			default:
				l.entries = append(l.entries, e)
			}
			return limit.Add(e)
		}}
		_, meta, err := s.client.KV().List(s.prefix+prefix, opts.WithContext(pairs.in(q.Context())))
		if err == nil {
			err = pairs.err
		}
		if err != nil {
			l = listing{}
			return err
		}
		l.meta, l.filtered = meta, meta.ResultsFilteredByACLs
		backend.SortEntries(l.entries)
		slices.Sort(l.folders)
		return nil
	})
	return l, err
}

// absenceError returns the error for an answer that doesn't prove that the keys it lacks are
// absent.
func (s *Store) absenceError(prefix string, l listing) *absentError {
	return &absentError{prefix: prefix, folder: s.prefix + prefix, keysLeftOut: l.folder && l.filtered}
}

// absentError is an ErrDenied. It is ErrNoFolder as well if the answer lacks the folder key. If the token may read that
// key, which then doesn't exist, it is ErrEmpty, too.
type absentError struct {
	prefix, folder string
	empty          bool
	// keysLeftOut is set if the answer has the folder key, but Consul left out others that the token may not read.
	keysLeftOut bool
}

func (e *absentError) Error() string {
	switch {
	case e.keysLeftOut:
		return fmt.Sprintf("list %s: Consul left out keys below %s that the token may not read: %v", e.prefix, e.folder,
			kv.ErrDenied)
	case e.empty:
		return fmt.Sprintf("list %s: the folder key %s does not exist: no mirror has run with this prefix, or Consul "+
			"has lost its data", e.prefix, e.folder)
	}
	return fmt.Sprintf(
		"list %s: the answer lacks the folder key %s: the token may not read it, or no mirror has created it yet: %v",
		e.prefix,
		e.folder,
		kv.ErrDenied,
	)
}

func (e *absentError) Is(target error) bool {
	switch target {
	case kv.ErrDenied:
		return true
	case kv.ErrNoFolder:
		return !e.keysLeftOut
	case kv.ErrEmpty:
		return e.empty
	}
	return false
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
			// Get comes first, as even a write that changes nothing costs the servers a round of consensus.
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
