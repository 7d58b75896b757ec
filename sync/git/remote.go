package git

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	gogit "github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/config"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/transport"
	"github.com/go-git/go-git/v5/storage/filesystem"

	"kedge/deployments/wait"
)

const (
	listTimeout  = 30 * time.Second
	fetchTimeout = 10 * time.Minute
	// stallTimeout is how long a server may send nothing of what it is asked for, before it is asked again.
	stallTimeout = 2 * time.Minute
	// askPause is from one question to a server to the next. The first webhook is heeded at once,
	// and one that somebody sends again and again doesn't use up what the server grants.
	askPause = 500 * time.Millisecond
	// maxPacks is how many packs the cache may hold, one a fetch, before it is made anew: go-git
	// does not repack.
	maxPacks = 50
)

// server is the host of a remote repository. A call ends with its context.
type server interface {
	// heads lists the branches whose names begin with prefix, by their full names.
	heads(ctx context.Context, prefix string) (map[string]string, error)
	// fetch begins to read the pack that q asks for, and names the commit that it was made for:
	// another one than q wants if the branch has moved and the server gives what it has now.
	fetch(ctx context.Context, q query) (io.ReadCloser, plumbing.Hash, error)
	close()
}

// remoteRepo is a repository behind https or ssh. Asking for its branches is cheap; objects are
// fetched when the branch has moved, into a bare cache on disk that can be thrown away at any time.
type remoteRepo struct {
	server  server
	host    transport.Endpoint
	app     bool // a GitHub App's tokens say who asks
	address string
	branch  string
	below   string // Config.Path
	every   time.Duration
	log     *slog.Logger
	stall   time.Duration // stallTimeout
	room    int64         // maxCache
	refused *BadCommit    // the branch's head, where that can't be fetched whenever it is tried; Head's alone
	putOff  time.Time     // until when the server asks not to be asked, and busy what it answered; Head's alone
	busy    error

	mu        sync.Mutex
	dir       string    // holds the cache
	cache     string    // the bare repository in dir; empty: none yet
	temporary bool      // dir goes with Close
	held      io.Closer // of a temporary dir
}

func newRemoteRepo(address, branch string, every time.Duration, a access, cacheDir string,
	log *slog.Logger) (*remoteRepo, error) {
	if trimmed := strings.TrimRight(address, "/"); strings.Contains(address, "://") {
		address = trimmed // with it go-git would ask for PATH//info/refs
	}
	endpoint, err := transport.NewEndpoint(address)
	if err != nil {
		return nil, fmt.Errorf("repository %q: %w", redact(address), err)
	}
	switch endpoint.Protocol {
	case "https":
		if endpoint.User != "" || endpoint.Password != "" {
			return nil, fmt.Errorf("repository %s carries a user name or password: give them as KEDGE_GIT_USER and "+
				"KEDGE_GIT_TOKEN", redact(address))
		}
	case "http":
		if ip := net.ParseIP(endpoint.Host); endpoint.Host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, fmt.Errorf("repository %s: plain http is accepted from this machine only: use https://", redact(address))
		}
	case "ssh":
		if endpoint.Password != "" {
			return nil, fmt.Errorf("repository %s carries a password: use a key", redact(address))
		}
		if endpoint.User == "" {
			endpoint.User = "git"
		}
	default:
		return nil, fmt.Errorf("repository %s: %s is not one of https, ssh, file or a path", redact(address),
			endpoint.Protocol)
	}
	r := &remoteRepo{
		host:    *endpoint,
		address: address,
		branch:  branch,
		every:   every,
		log:     log,
		stall:   stallTimeout,
		room:    maxCache,
		app:     a.env("KEDGE_GITHUB_APP_ID") != "",
	}
	if endpoint.Protocol == "ssh" {
		r.server = &sshServer{endpoint: *endpoint, access: a}
	} else {
		r.server = &httpServer{endpoint: *endpoint, access: a}
	}
	if cacheDir == "" {
		if r.dir, r.held, err = temporaryDir(os.TempDir()); err != nil {
			return nil, fmt.Errorf("cache of the repository: %w", err)
		}
		r.temporary = true
		return r, nil
	}
	if err := os.MkdirAll(cacheDir, 0o700); err != nil {
		return nil, fmt.Errorf("cache of the repository: %w", err)
	}
	r.dir = cacheDir
	r.cache = r.kept()
	for _, cut := range []string{fetchPrefix + "*", filepath.Join(cacheName, unfinished)} {
		// A mirror that was killed while it fetched left them.
		left, _ := filepath.Glob(filepath.Join(cacheDir, cut))
		for _, name := range left {
			if err := os.RemoveAll(name); err != nil {
				return nil, fmt.Errorf("cache of the repository: %w", err)
			}
		}
	}
	return r, nil
}

// kept finds the cache that an earlier mirror of the same repository and branch left, if it is whole.
func (r *remoteRepo) kept() string {
	name := filepath.Join(r.dir, cacheName)
	kept, err := gogit.PlainOpen(name)
	if err != nil {
		return ""
	}
	c, err := kept.Config()
	if err != nil || c.Remotes["origin"] == nil || len(c.Remotes["origin"].URLs) != 1 ||
		c.Remotes["origin"].URLs[0] != r.address {
		return ""
	}
	return name
}

// What lies in the cache's directory: the cache, and what is being fetched to take its place.
const (
	cacheName   = "repo.git"
	fetchPrefix = "fetch-"
	unfinished  = "objects/pack/tmp_*" // of a repository: what go-git has yet to finish
)

func (r *remoteRepo) Watch(ctx context.Context, _ func()) { <-ctx.Done() }
func (r *remoteRepo) Interval() time.Duration             { return r.every }
func (r *remoteRepo) Pause() time.Duration                { return askPause }

func (r *remoteRepo) Close() error {
	r.server.close()
	if r.temporary {
		return errors.Join(os.RemoveAll(r.dir), r.held.Close())
	}
	return nil
}

func (r *remoteRepo) Objects() (*Objects, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cache == "" {
		return nil, fmt.Errorf("repository %s was not fetched yet", r.address)
	}
	in, err := OpenObjects(filepath.Join(r.cache, "objects"))
	if err != nil {
		return nil, err
	}
	in.below, in.filtered = r.below, true
	return in, nil
}

func (r *remoteRepo) Distrust() {
	r.mu.Lock()
	r.cache = ""
	r.mu.Unlock()
}

func (r *remoteRepo) Head(ctx context.Context) (string, error) {
	if time.Now().Before(r.putOff) {
		return "", r.busy
	}
	head, err := r.follow(ctx)
	if refusal := (*Refusal)(nil); errors.As(err, &refusal) && refusal.After > 0 {
		r.putOff, r.busy = time.Now().Add(refusal.After), err
	}
	return head, err
}

// follow asks for the branch's head, and fetches it where it is new.
func (r *remoteRepo) follow(ctx context.Context) (string, error) {
	name := plumbing.NewBranchReferenceName(r.branch).String()
	heads, err := r.list(ctx, name)
	if err != nil {
		return "", r.explain("list the branches of", err)
	}
	want := heads[name]
	if want == "" {
		return "", r.noBranch(ctx)
	}
	if have, err := r.cached(); err == nil && have == want {
		return want, nil
	}
	if r.refused != nil && r.refused.Hash == want {
		return "", r.refused
	}
	if err := r.fetch(ctx, plumbing.NewHash(want)); err != nil {
		err = r.explain("fetch from", err)
		if errors.As(err, new(*objectTooLarge)) || errors.As(err, new(*packTooLarge)) {
			r.refused = &BadCommit{want, err}
			return "", r.refused
		}
		return "", err
	}
	return r.cached() // which may be newer than want
}

func (r *remoteRepo) list(ctx context.Context, prefix string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	return r.server.heads(ctx, prefix)
}

// noBranch returns an ErrNoBranch that names the branches that exist.
func (r *remoteRepo) noBranch(ctx context.Context) error {
	heads, err := r.list(ctx, "refs/heads/")
	if err != nil {
		return r.explain("list the branches of", err)
	}
	return missing(r.branch, r.address, slices.Collect(maps.Keys(heads)))
}

// cached names the branch's head in the cache.
func (r *remoteRepo) cached() (string, error) {
	r.mu.Lock()
	cache := r.cache
	r.mu.Unlock()
	if cache == "" {
		return "", ErrNoBranch
	}
	return branchHead(cache, r.branch)
}

// fetch brings the cache up to date, or makes it anew where it is missing, broken or has grown too
// many packs.
func (r *remoteRepo) fetch(ctx context.Context, want plumbing.Hash) error {
	r.mu.Lock()
	cache := r.cache
	r.mu.Unlock()
	if cache != "" {
		packs, _ := filepath.Glob(filepath.Join(cache, "objects", "pack", "*.pack"))
		if len(packs) < maxPacks {
			err := r.fetchInto(ctx, cache, want)
			if !errors.Is(err, errCache) && !errors.As(err, new(*packTooLarge)) || ctx.Err() != nil {
				return err
			}
			r.log.Warn("the cache of the repository is of no use, it is fetched anew", "cache", cache, "error", err)
		}
	}
	fresh, err := os.MkdirTemp(r.dir, fetchPrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(fresh)
	if err := r.fetchInto(ctx, fresh, want); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	name := filepath.Join(r.dir, cacheName)
	if err := os.RemoveAll(name); err != nil {
		return err
	}
	if err := os.Rename(fresh, name); err != nil {
		return err
	}
	r.cache = name
	return nil
}

func (r *remoteRepo) fetchInto(ctx context.Context, dir string, want plumbing.Hash) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	ctx, give := context.WithCancelCause(ctx)
	defer give(nil)
	progress := &counter{}
	go endStalled(ctx, r.stall, give, progress.n.Load)
	err := r.fetchOnce(ctx, dir, want, progress)
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		return fmt.Errorf("%w for %v", errStalled, r.stall)
	}
	return err
}

// errCache says that the cache can't be used, though the server may be well.
var errCache = errors.New("the cache can't be used")

// fetchOnce brings want into the bare repository at dir, which it makes where there is none, and
// lets the branch there be at it.
func (r *remoteRepo) fetchOnce(ctx context.Context, dir string, want plumbing.Hash, progress *counter) error {
	store, err := openCache(dir, r.address)
	if err != nil {
		return fmt.Errorf("%w: %w", errCache, err)
	}
	defer store.Close()
	branch := plumbing.NewBranchReferenceName(r.branch)
	if store.HasEncodedObject(want) != nil {
		q := query{branch: branch.String(), want: want}
		if head, err := store.Reference(branch); err == nil {
			q.haves = ancestors(store, head.Hash(), maxHaves)
		}
		var pack io.ReadCloser
		if pack, want, err = r.server.fetch(ctx, q); err != nil {
			return err
		}
		defer pack.Close()
		packs := filepath.Join(dir, "objects", "pack")
		err = storePack(ctx, io.TeeReader(pack, progress), packs, r.room-sizeOf(packs), progress)
		if err != nil {
			return err
		}
		store.Reindex()
		if err := store.HasEncodedObject(want); err != nil {
			return fmt.Errorf("%w: commit %s: %w", errCache, want, err)
		}
	}
	return store.SetReference(plumbing.NewHashReference(branch, want))
}

// openCache opens the bare repository at dir, or makes it.
func openCache(dir, address string) (*filesystem.Storage, error) {
	bare, err := gogit.PlainOpen(dir)
	if errors.Is(err, gogit.ErrRepositoryNotExists) {
		bare, err = gogit.PlainInit(dir, true)
	}
	if err != nil {
		return nil, err
	}
	origin := config.RemoteConfig{Name: "origin", URLs: []string{address}}
	if _, err := bare.CreateRemote(&origin); err != nil && !errors.Is(err, gogit.ErrRemoteExists) {
		return nil, err
	}
	return bare.Storer.(*filesystem.Storage), os.MkdirAll(filepath.Join(dir, "objects", "pack"), 0o755)
}

// maxHaves bounds the commits that a server is told of: after a force push it finds a common one among them.
const maxHaves = 64

// counter counts what is written to it.
type counter struct{ n atomic.Int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// endStalled cancels once progress gives the same for as long as stall.
func endStalled(ctx context.Context, stall time.Duration, cancel context.CancelCauseFunc, progress func() int64) {
	last, since := progress(), time.Now()
	for wait.For(ctx, stall/8) == nil {
		if now := progress(); now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) >= stall {
			cancel(errStalled)
		}
	}
}

// sizeOf adds up the files of a directory.
func sizeOf(dir string) (sum int64) {
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		if info, err := f.Info(); err == nil {
			sum += info.Size()
		}
	}
	return sum
}

var errStalled = errors.New("the server sends nothing")

// explain adds to an error what to do about it.
func (r *remoteRepo) explain(doing string, err error) error {
	hint := ""
	if unexpected := (*plumbing.UnexpectedError)(nil); errors.As(err, &unexpected) { // which doesn't unwrap
		err = unexpected.Err
	}
	err = bare(err)
	refusal := (*Refusal)(nil)
	switch {
	case errors.As(err, new(*hostKeyError)):
	case errors.As(err, &refusal):
		hint = refusal.hint(r.host.String(), r.app)
	case errors.Is(err, transport.ErrAuthenticationRequired), errors.Is(err, transport.ErrAuthorizationFailed):
		hint = " (KEDGE_GIT_USER and KEDGE_GIT_TOKEN say who asks)"
	case errors.Is(err, transport.ErrRepositoryNotFound):
		hint = " (or it may not be seen with these credentials)"
	case strings.Contains(err.Error(), "unable to authenticate"):
		hint = " (the server doesn't accept this key for " + r.host.User + ")"
	case strings.Contains(err.Error(), "x509:"):
		hint = " (GIT_SSL_CAINFO names a file of further authorities)"
	}
	return fmt.Errorf("%s %s: %w%s", doing, r.address, err, hint)
}

// redact removes the password from an address.
func redact(address string) string {
	if u, err := url.Parse(address); err == nil && u.User != nil {
		u.User = url.User("...")
		return u.String()
	}
	return address
}
