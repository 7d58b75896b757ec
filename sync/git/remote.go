package git

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	gogit "github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/config"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/storage/filesystem"
	"golang.org/x/sys/unix"

	"kedge/deployments/wait"
	"kedge/sync/git/pack"
	"kedge/sync/git/transport"
)

const (
	listTimeout  = 30 * time.Second
	fetchTimeout = 10 * time.Minute
	// stallTimeout is how long a server may send nothing in a fetch before the fetch is cancelled and retried.
	stallTimeout = 2 * time.Minute
	// askPause is the least time between two polls of a server. A webhook triggers a poll at once if the last one was
	// longer ago. Repeated webhooks can't use up the server's rate limit.
	askPause = 500 * time.Millisecond
	// maxPacks is how many packs, one for each fetch, the cache may hold before it is rebuilt: go-git does not
	// repack.
	maxPacks = 50
	// maxObject bounds each object that a fetch keeps, in bytes. No larger object is ever read from a commit.
	maxObject = maxTree
	// maxCache bounds the packs of a cache on disk, in bytes. While a cache is rebuilt, the disk holds two caches, each
	// up to that size.
	maxCache = 4 << 30
)

// remoteRepo is a branch of a repository behind https or ssh. Listing branches is cheap. Objects are fetched when the
// branch has moved, into a bare cache on disk that can be removed at any time.
type remoteRepo struct {
	server  *transport.Repository
	branch  string
	subdir  string // Config.Path
	every   time.Duration
	log     *slog.Logger
	stall   time.Duration // as stallTimeout
	room    int64         // as maxCache
	refused *BadCommit    // the last head that was too large to be fetched; only Head uses it
	putOff  time.Time     // the end of a pause that the server asked for; only Head uses it
	busyErr error         // what Head returns until putOff

	mu        sync.Mutex
	dir       string    // holds the cache
	cache     string    // the bare repository in dir; empty: the next fetch makes it
	temporary bool      // Close removes dir
	held      io.Closer // the lock of a temporary dir
}

func newRemoteRepo(c Config, below string) (*remoteRepo, error) {
	server, err := transport.Open(c.Repo, transport.Access{SSHKey: c.SSHKey, KnownHosts: c.KnownHosts, Env: c.Env})
	if err != nil {
		return nil, err
	}
	r := &remoteRepo{server: server, branch: c.Branch, subdir: below, every: c.Every, log: c.Log, stall: stallTimeout,
		room: maxCache}
	if c.CacheDir == "" {
		if r.dir, r.held, err = temporaryDir(os.TempDir()); err != nil {
			return nil, fmt.Errorf("making a directory for the repository's cache: %w", err)
		}
		r.temporary = true
		return r, nil
	}
	if err := os.MkdirAll(c.CacheDir, 0o700); err != nil {
		return nil, fmt.Errorf("making a directory for the repository's cache: %w", err)
	}
	r.dir = c.CacheDir
	r.cache = r.kept()
	for _, cut := range []string{fetchPrefix + "*", filepath.Join(cacheName, unfinishedPacks)} {
		// A mirror that was killed during a fetch left these files.
		left, _ := filepath.Glob(filepath.Join(c.CacheDir, cut))
		for _, name := range left {
			if err := os.RemoveAll(name); err != nil {
				return nil, fmt.Errorf("removing an unfinished fetch from the repository's cache: %w", err)
			}
		}
	}
	return r, nil
}

// kept returns the path of the cache that an earlier mirror of the same repository left; empty: none can be opened.
func (r *remoteRepo) kept() string {
	name := filepath.Join(r.dir, cacheName)
	kept, err := gogit.PlainOpen(name)
	if err != nil {
		return ""
	}
	c, err := kept.Config()
	if err != nil || c.Remotes["origin"] == nil || len(c.Remotes["origin"].URLs) != 1 ||
		c.Remotes["origin"].URLs[0] != r.server.Address() {
		return ""
	}
	return name
}

// Names in Config.CacheDir or a temporary directory: the cache, and the fetch that is to replace it.
const (
	cacheName       = "repo.git"
	fetchPrefix     = "fetch-"
	unfinishedPacks = "objects/pack/tmp_*" // the unfinished files of pack.Store, below a repository

	// A temporary directory is made by each mirror that has no CacheDir, and contains a lock.
	temporaryPrefix = "kedge-mirror-"
	lockFile        = "lock"
)

func (r *remoteRepo) Watch(ctx context.Context, _ func()) { <-ctx.Done() }
func (r *remoteRepo) Interval() time.Duration             { return r.every }
func (r *remoteRepo) Pause() time.Duration                { return askPause }

func (r *remoteRepo) Close() error {
	r.server.Close()
	if r.temporary {
		return errors.Join(os.RemoveAll(r.dir), r.held.Close())
	}
	return nil
}

func (r *remoteRepo) Objects() (*Objects, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cache == "" {
		return nil, fmt.Errorf("the cache has no usable copy of repository %s: the next poll fetches one", r.server.Address())
	}
	in, err := OpenObjects(filepath.Join(r.cache, "objects"))
	if err != nil {
		return nil, err
	}
	in.subdir, in.filtered = r.subdir, true
	return in, nil
}

func (r *remoteRepo) Distrust() {
	r.mu.Lock()
	r.cache = ""
	r.mu.Unlock()
}

func (r *remoteRepo) Head(ctx context.Context) (string, error) {
	if time.Now().Before(r.putOff) {
		return "", r.busyErr
	}
	head, err := r.follow(ctx)
	if refusal := (*transport.Refusal)(nil); errors.As(err, &refusal) && refusal.After > 0 {
		r.putOff, r.busyErr = time.Now().Add(refusal.After), err
	}
	return head, err
}

// follow returns the hash of the branch's newest commit, and fetches the commit if the cache lacks
// it. If an earlier call found that commit too large, follow doesn't fetch, and returns r.refused.
func (r *remoteRepo) follow(ctx context.Context) (string, error) {
	name := plumbing.NewBranchReferenceName(r.branch).String()
	heads, err := r.list(ctx, name)
	if err != nil {
		return "", r.server.Explain("list the branches of", err)
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
		err = r.server.Explain("fetch from", err)
		if errors.As(err, new(*pack.ObjectTooLarge)) || errors.As(err, new(*pack.TooLarge)) {
			r.refused = &BadCommit{want, err}
			return "", r.refused
		}
		return "", err
	}
	return r.cached() // may be newer than want
}

func (r *remoteRepo) list(ctx context.Context, prefix string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	return r.server.Heads(ctx, prefix)
}

// noBranch returns an ErrNoBranch that names some of the branches that exist, or the error of listing them.
func (r *remoteRepo) noBranch(ctx context.Context) error {
	heads, err := r.list(ctx, "refs/heads/")
	if err != nil {
		return r.server.Explain("list the branches of", err)
	}
	return missing(r.branch, r.server.Address(), slices.Collect(maps.Keys(heads)))
}

// cached returns the branch's head in the cache; ErrNoBranch if there is no cache, or it lacks the branch.
func (r *remoteRepo) cached() (string, error) {
	r.mu.Lock()
	cache := r.cache
	r.mu.Unlock()
	if cache == "" {
		return "", ErrNoBranch
	}
	return branchHead(cache, r.branch)
}

// fetch updates the cache, or rebuilds it if it is missing, broken or full, or has too many packs.
func (r *remoteRepo) fetch(ctx context.Context, want plumbing.Hash) error {
	r.mu.Lock()
	cache := r.cache
	r.mu.Unlock()
	if cache != "" {
		packs, _ := filepath.Glob(filepath.Join(cache, "objects", "pack", "*.pack"))
		if len(packs) < maxPacks {
			err := r.fetchInto(ctx, cache, want)
			if !errors.Is(err, errCache) && !errors.As(err, new(*pack.TooLarge)) || ctx.Err() != nil {
				return err
			}
			r.log.Warn("the cache of the repository can't be used: fetching it again", "cache", cache, "error", err)
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

// errCache means that a fetch failed in a way that a new cache may cure.
var errCache = errors.New("the cache can't be used")

// fetchOnce fetches the commit want into the bare repository at dir, unless it is there, and sets the branch to it. If
// the branch has moved, it may fetch and set the branch's new head instead. A repository that doesn't exist yet is
// made.
func (r *remoteRepo) fetchOnce(ctx context.Context, dir string, want plumbing.Hash, progress *counter) error {
	store, err := openCache(dir, r.server.Address())
	if err != nil {
		return fmt.Errorf("%w: %w", errCache, err)
	}
	defer store.Close()
	branch := plumbing.NewBranchReferenceName(r.branch)
	if store.HasEncodedObject(want) != nil {
		q := transport.Query{Branch: branch.String(), Want: want, MaxFile: maxFile}
		if head, err := store.Reference(branch); err == nil {
			q.Haves = ancestors(store, head.Hash(), maxHaves)
		}
		var sent io.ReadCloser
		if sent, want, err = r.server.Fetch(ctx, q); err != nil {
			return err
		}
		defer sent.Close()
		packs := filepath.Join(dir, "objects", "pack")
		limits := pack.Limits{Object: maxObject, Pack: r.room - sizeOf(packs)}
		err = pack.Store(ctx, io.TeeReader(sent, progress), packs, limits, progress)
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

// maxHaves bounds the commits that a fetch tells the server it has. They are the cached head and its newest ancestors,
// so that the server finds a common ancestor after most force pushes, too.
const maxHaves = 64

// counter counts the bytes that are written to it.
type counter struct{ n atomic.Int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// endStalled calls cancel once progress hasn't changed for as long as stall.
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

// sizeOf returns the total size of the files in a directory.
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

// temporaryDir makes a directory in parent, which other mirrors leave alone until held is closed. It also removes the
// temporary directories that killed mirrors left in parent, except those that removeAbandoned keeps.
func temporaryDir(parent string) (dir string, held io.Closer, err error) {
	left, _ := filepath.Glob(filepath.Join(parent, temporaryPrefix+"*"))
	for _, name := range left {
		removeAbandoned(name)
	}
	if dir, err = os.MkdirTemp(parent, temporaryPrefix); err != nil {
		return "", nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err == nil {
			return dir, f, nil
		}
		f.Close()
		err = fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	return "", nil, errors.Join(err, os.RemoveAll(dir))
}

// removeAbandoned removes a temporary directory that nobody holds. It keeps one whose lock can't be opened, such as
// another user's. It also keeps one that changed within the last minute: its mirror may be about to lock it.
func removeAbandoned(dir string) {
	if info, err := os.Lstat(dir); err != nil || !info.IsDir() || time.Since(info.ModTime()) < time.Minute {
		return
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		_ = os.RemoveAll(dir) // fails if it is another user's
	}
}
