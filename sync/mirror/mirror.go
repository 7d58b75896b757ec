// Package mirror copies a deployments repo from Git to the store. A commit is taken whole or not at all; what
// differs is written in transactions that are fenced by a lease, so that of several mirrors one works, and one that
// lost its lease can't change a key, whatever it believes. The one thing that a mirror writes without it is
// mirror/hook, which passes a webhook on to the mirror that has it.
//
// It is driven by state, not by events: whatever wakes it (a push, a poll, a change of the store, the clock), it
// looks at the newest commit and at what the store holds, and writes the difference. A transaction that was cut
// short is finished by the next look, a record changed by hand is put back, and a mirror that takes over begins in
// the same way.
//
// What is not taken: a commit with any mistake in it; one that bears no signature of Config.SignedBy, where that is
// set; one that does not descend from the last (allow_rewind), or that removes too many units at once
// (max_removed), both as the commit says that was taken last; one that names a release that does more than the
// commit's own kedge.yaml allows for its stage (dests, users, commands), for which the mirror reads the manifests
// of what the commit changes, and waits while it can't; with Releases.Trust, one whose releases bear no signature
// that counts waits as well. The signature asked for is the newest commit's: it vouches for the whole tree. Git
// binds no signature to a branch: any signed commit that descends from the last can be pushed by whoever may push.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"kedge/artifact/object"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/sync/git"
	"kedge/sync/git/transport"
)

// Config configures a Mirror.
type Config struct {
	Store kv.Store
	// Repo is https://…, ssh://… or git@HOST:PATH, of which no object beyond 16 MiB is kept, or the path of a local
	// bare repo, which is watched. Branch: default main.
	Repo, Branch string
	// Path is the directory of the repository that holds STAGE/ROLE/UNIT.yaml and kedge.yaml, for a monorepo; default:
	// all of it.
	Path string
	// Every is the time between polls, ±20 %; default 15 s (a watched local repo: 60 s, as a safety net).
	Every time.Duration
	// Accept is the full hash of a commit that is taken, once it is the branch's head, whatever its history and the
	// units that it removes: the way in for a repository that was replaced. Where the store holds a commit that
	// follows it, it counts for nothing.
	Accept string
	// Name is shown as the lease's holder; default the host's name.
	Name string
	// LeaseTTL default 15 s.
	LeaseTTL time.Duration
	// SSHKey is a private key's file (default: the SSH agent), KnownHosts a known_hosts file (default
	// ~/.ssh/known_hosts). HTTPS takes KEDGE_GIT_USER and KEDGE_GIT_TOKEN from the environment, or a file named by
	// KEDGE_GIT_TOKEN_FILE, and trusts the authorities of the file named by GIT_SSL_CAINFO beside the system's.
	SSHKey, KnownHosts string
	// CacheDir keeps a remote repo's objects, so that a mirror that starts while Git is away can go on; one mirror a
	// directory. Default: a temporary one, which goes with Run.
	CacheDir string
	// SignedBy is an allowed_signers file; with one, a commit that bears none of its signatures is refused.
	SignedBy string
	// SignedByPGP is a file of armoured OpenPGP public keys, whose signatures count as well.
	SignedByPGP string
	// Listen serves webhooks (/hook), /live and /metrics; empty: nowhere. ":0" is fine: see Addr. Webhooks need a
	// secret, in KEDGE_WEBHOOK_SECRET or the file named by KEDGE_WEBHOOK_SECRET_FILE.
	Listen string
	// Releases reads the manifests of what a commit names anew, of stages that kedge.yaml bounds by more than sources;
	// with Trust of all. Its Objects are by default what object.New gives.
	Releases Releases
	// Snapshot, where set, is given the records that the mirror that holds the lease wrote, after they changed: for
	// nodes that boot while the store is away. One call at a time, the newest state; an error is logged, and it is
	// tried again.
	Snapshot func(ctx context.Context, desired []kv.Entry) error
	// Leading, where set, is run while this mirror holds the lease; it returns when its context ends.
	Leading func(ctx context.Context) error
	Version string
	// Env reads an environment variable; default os.Getenv.
	Env     func(string) string
	Metrics *prometheus.Registry // nil: none
	Log     *slog.Logger         // nil: none
}

// Mirror copies a deployments repo to the store while it holds the lease. Make it with New, then Run it once.
type Mirror struct {
	c        Config
	branch   git.Branch
	signers  *git.Signers // nil: signatures are not asked for
	metrics  *metrics
	listener net.Listener // nil: none
	secret   string       // of webhooks

	pollNow wait.Signal // asks for a poll
	hooked  wait.Signal // asks for a webhook to be passed on
	hurry   wait.Signal // asks the leader to look for releases anew

	hookPause, patience, forgetAfter, rebuildWait time.Duration // as the constants of these names

	mu      sync.Mutex
	git     gitState
	changed chan struct{} // closed, and made anew, when git changes
	holds   kv.Lease      // the lease that this mirror works under; nil: none
	scene   *scene        // nil: this mirror doesn't lead
	// complained is when a refused webhook was last logged.
	complained time.Time
}

// gitState is the branch as the mirror last read it.
type gitState struct {
	head string      // its newest commit; empty: not known yet
	good *git.Commit // that commit, where it can be taken
	bad  error       // else why it can't
	away error       // why head may be out of date; nil: it isn't
}

// New checks c, and listens. It does not wait for Git or the store to be reachable.
func New(c Config) (*Mirror, error) {
	if c.Store == nil || c.Repo == "" {
		return nil, errors.New("a mirror needs a store and a repository")
	}
	if c.Branch == "" {
		c.Branch = "main"
	}
	if c.Accept != "" && !git.IsHash(c.Accept) {
		return nil, fmt.Errorf("accept %q: want a commit's full hash", c.Accept)
	}
	if c.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("name of this host: %w", err)
		}
		c.Name = name
	}
	if c.LeaseTTL == 0 {
		c.LeaseTTL = 15 * time.Second
	}
	if c.Env == nil {
		c.Env = os.Getenv
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Releases.Objects == nil {
		c.Releases.Objects = object.New(object.Config{Log: c.Log})
	}
	m := &Mirror{
		c:           c,
		metrics:     newMetrics(c.Metrics),
		pollNow:     wait.NewSignal(),
		changed:     make(chan struct{}),
		hooked:      wait.NewSignal(),
		hurry:       wait.NewSignal(),
		hookPause:   hookPause,
		patience:    patience,
		forgetAfter: forgetAfter,
		rebuildWait: rebuildWait,
	}
	if c.Metrics != nil {
		c.Metrics.MustRegister(newUnitMetrics(m))
	}
	var err error
	if m.secret, err = transport.Secret(c.Env, "KEDGE_WEBHOOK_SECRET"); err != nil {
		return nil, err
	}
	if m.signers, err = git.OpenSigners(c.SignedBy, c.SignedByPGP, c.CacheDir); err != nil {
		return nil, err
	}
	if m.branch, err = git.Open(
		git.Config{Repo: c.Repo, Branch: c.Branch, Path: c.Path, Every: c.Every, SSHKey: c.SSHKey, KnownHosts: c.KnownHosts,
			CacheDir: c.CacheDir, Env: c.Env, Log: c.Log},
	); err != nil {
		return nil, err
	}
	if c.Listen != "" {
		if m.listener, err = net.Listen("tcp", c.Listen); err != nil {
			return nil, errors.Join(fmt.Errorf("listen: %w", err), m.branch.Close())
		}
	}
	return m, nil
}

// Addr is the address of Listen; empty without one.
func (m *Mirror) Addr() string {
	if m.listener == nil {
		return ""
	}
	return m.listener.Addr().String()
}

// Trigger asks for a poll at once.
func (m *Mirror) Trigger() { m.pollNow.Set() }

// Run mirrors until ctx ends, and returns nil then. Trouble with Git or the store doesn't end it.
func (m *Mirror) Run(ctx context.Context) error {
	defer m.branch.Close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.serve(ctx) })
	g.Go(func() error { m.branch.Watch(ctx, m.Trigger); return nil })
	g.Go(func() error { m.follow(ctx); return nil })
	g.Go(func() error { m.passOn(ctx); return nil })
	g.Go(func() error { m.lead(ctx); return nil })
	return g.Wait()
}

// follow keeps m.git up to date, whether this mirror holds the lease or waits for it.
func (m *Mirror) follow(ctx context.Context) {
	retry := wait.NewBackoff(100*time.Millisecond, 30*time.Second)
	for ctx.Err() == nil {
		before, began := m.state(), time.Now()
		after := m.look(ctx, before)
		if ctx.Err() != nil {
			return
		}
		m.setState(after)
		m.logGit(before, after)
		delay := wait.Jitter(m.branch.Interval(), 0.2)
		switch {
		case after.away == nil:
			retry.Reset()
		case errors.Is(after.away, git.ErrNoBranch): // somebody has to push: nothing to hurry for
		default:
			delay = retry.Next()
		}
		select {
		case <-ctx.Done():
		case <-m.pollNow.C():
			if err := wait.For(ctx, m.branch.Pause()-time.Since(began)); err != nil {
				return
			}
		case <-time.After(delay):
		}
	}
}

// look asks Git for the branch's head, and reads it where it is new.
func (m *Mirror) look(ctx context.Context, was gitState) gitState {
	head, err := m.branch.Head(ctx)
	if bad := (*git.BadCommit)(nil); errors.As(err, &bad) {
		m.metrics.polled(nil)
		return gitState{head: bad.Hash, bad: err}
	}
	m.metrics.polled(err)
	if err != nil {
		was.away = err
		return was
	}
	if was.head == head && was.bad == nil { // a bad one is looked at again: the signers' file may have changed
		was.away = nil
		return was
	}
	commit, err := m.load(head)
	switch {
	case errors.As(err, new(*git.BadCommit)):
		return gitState{head: head, bad: err}
	case err != nil:
		m.branch.Distrust()
		was.away = err
		return was
	}
	return gitState{head: head, good: commit}
}

func (m *Mirror) load(hash string) (*git.Commit, error) {
	from, err := m.branch.Objects()
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return from.Load(hash, m.signers)
}

// loadTaken reads a commit that a mirror took before, whatever became of its signer since.
func (m *Mirror) loadTaken(hash string) (*git.Commit, error) {
	from, err := m.branch.Objects()
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return from.LoadTaken(hash, m.signers)
}

func (m *Mirror) logGit(before, after gitState) {
	switch {
	case after.away != nil && before.away == nil:
		m.c.Log.Warn(
			"Git can't be read, what was mirrored stays",
			"repo",
			m.c.Repo,
			"branch",
			m.c.Branch,
			"error",
			after.away,
		)
	case after.away == nil && before.away != nil:
		m.c.Log.Info("Git can be read again", "repo", m.c.Repo, "head", after.head)
	}
	if after.head == before.head {
		return
	}
	if after.bad != nil {
		m.c.Log.Error("the commit is not taken", "commit", after.head, "error", after.bad)
		return
	}
	m.c.Log.Info(
		"commit read",
		"commit",
		after.head,
		"author",
		after.good.Author,
		"subject",
		after.good.Subject,
		"units",
		len(after.good.Tree.Units),
	)
}

func (m *Mirror) state() gitState {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.git
}

func (m *Mirror) setState(s gitState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	same := s.head == m.git.head && s.good == m.git.good && text(s.bad) == text(m.git.bad) &&
		text(s.away) == text(m.git.away)
	m.git = s
	if !same {
		close(m.changed)
		m.changed = make(chan struct{})
	}
}

// gitChanged is closed at the next change of state.
func (m *Mirror) gitChanged() (gitState, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.git, m.changed
}

// text is an error's, "" for nil: errors of some types can't be compared themselves.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
