package git

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	gogit "github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/config"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"
	gitssh "github.com/go-git/go-git/v5/plumbing/transport/ssh"
	"github.com/go-git/go-git/v5/storage/filesystem"
	"github.com/go-git/go-git/v5/storage/memory"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"kedge/deployments/wait"
)

const (
	listTimeout  = 30 * time.Second
	fetchTimeout = 10 * time.Minute
	// stallTimeout is how long a server may send nothing of what it is asked for, before it is asked again.
	stallTimeout = 2 * time.Minute
	// askPause is from one question to a server to the next. The first webhook is heeded at once, and one that somebody sends again and
	// again doesn't use up what the server grants.
	askPause = 500 * time.Millisecond
	// maxPacks is how many packs the cache may hold, one a fetch, before it is made anew: go-git does not repack.
	maxPacks = 50
	// maxHung bounds calls that were given up but have not returned: go-git's ssh can't be interrupted.
	maxHung = 4
)

// remoteRepo is a repository behind https or ssh. Asking for its branches is cheap; objects are fetched when the branch has moved,
// into a bare cache on disk that can be thrown away at any time.
type remoteRepo struct {
	address  string
	endpoint *transport.Endpoint
	branch   string
	every    time.Duration
	access   access
	log      *slog.Logger
	hung     chan struct{}
	stall    time.Duration // stallTimeout
	refused  *BadCommit    // the branch's head, where that can't be fetched whenever it is tried; head's alone

	mu        sync.Mutex
	dir       string // holds the cache
	cache     string // the bare repository in dir; empty: none yet
	temporary bool   // dir goes with close
}

// access is how a remote repository is reached.
type access struct {
	sshKey, knownHosts, caFile string
	env                        func(string) string
}

func newRemoteRepo(address, branch string, every time.Duration, a access, cacheDir string, log *slog.Logger) (*remoteRepo, error) {
	endpoint, err := transport.NewEndpoint(address)
	if err != nil {
		return nil, fmt.Errorf("repository %q: %w", redact(address), err)
	}
	switch endpoint.Protocol {
	case "https":
		if endpoint.User != "" || endpoint.Password != "" {
			return nil, fmt.Errorf("repository %s carries a user name or password: give them as KEDGE_GIT_USER and KEDGE_GIT_TOKEN", redact(address))
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
		return nil, fmt.Errorf("repository %s: %s is not one of https, ssh, file or a path", redact(address), endpoint.Protocol)
	}
	r := &remoteRepo{address: address, endpoint: endpoint, branch: branch, every: every, access: a, log: log,
		hung: make(chan struct{}, maxHung), stall: stallTimeout}
	if cacheDir == "" {
		if r.dir, err = os.MkdirTemp("", "kedge-mirror-"); err != nil {
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
	for _, cut := range []string{fetchPrefix + "*", filepath.Join(cacheName, unfinished)} { // by a mirror that was killed while it fetched
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
	if err != nil || c.Remotes["origin"] == nil || len(c.Remotes["origin"].URLs) != 1 || c.Remotes["origin"].URLs[0] != r.address {
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
	if r.temporary {
		return os.RemoveAll(r.dir)
	}
	return nil
}

func (r *remoteRepo) Objects() (*Objects, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cache == "" {
		return nil, fmt.Errorf("repository %s was not fetched yet", r.address)
	}
	return OpenObjects(filepath.Join(r.cache, "objects"))
}

func (r *remoteRepo) Distrust() {
	r.mu.Lock()
	r.cache = ""
	r.mu.Unlock()
}

func (r *remoteRepo) Head(ctx context.Context) (string, error) {
	auth, ca, err := r.access.credentials(r.endpoint)
	if err != nil {
		return "", err
	}
	refs, err := patient(ctx, r, listTimeout, func(ctx context.Context) ([]*plumbing.Reference, error) {
		origin := gogit.NewRemote(memory.NewStorage(), &config.RemoteConfig{Name: "origin", URLs: []string{r.endpoint.String()}})
		return origin.ListContext(ctx, &gogit.ListOptions{Auth: auth, CABundle: ca, Timeout: int(listTimeout / time.Second)})
	})
	if err != nil && !errors.Is(err, transport.ErrEmptyRemoteRepository) {
		return "", r.explain("list the branches of", err)
	}
	name := plumbing.NewBranchReferenceName(r.branch)
	want := ""
	for _, ref := range refs {
		if ref.Name() == name {
			want = ref.Hash().String()
		}
	}
	if want == "" {
		return "", fmt.Errorf("%w: %s in %s", ErrNoBranch, r.branch, r.address)
	}
	if have, err := r.cached(); err == nil && have == want {
		return want, nil
	}
	if r.refused != nil && r.refused.Hash == want {
		return "", r.refused
	}
	if err := r.fetch(ctx, auth, ca); err != nil {
		err = r.explain("fetch from", err)
		if errors.As(err, new(*objectTooLarge)) {
			r.refused = &BadCommit{want, err}
			return "", r.refused
		}
		return "", err
	}
	return r.cached() // which may be newer than want
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

// fetch brings the cache up to date, or makes it anew where it is missing, broken or has grown too many packs.
func (r *remoteRepo) fetch(ctx context.Context, auth transport.AuthMethod, ca []byte) error {
	r.mu.Lock()
	cache := r.cache
	r.mu.Unlock()
	if cache != "" {
		packs, _ := filepath.Glob(filepath.Join(cache, "objects", "pack", "*.pack"))
		if len(packs) < maxPacks {
			err := r.fetchInto(ctx, cache, auth, ca)
			if err == nil || ctx.Err() != nil || isRemoteFault(err) {
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
	if err := r.fetchInto(ctx, fresh, auth, ca); err != nil {
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

func (r *remoteRepo) fetchInto(ctx context.Context, dir string, auth transport.AuthMethod, ca []byte) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	said := &counter{}
	go endStalled(ctx, r.stall, cancel, func() int64 { return said.n.Load() + sizeOf(filepath.Join(dir, "objects", "pack")) })
	_, err := patient(ctx, r, fetchTimeout, func(ctx context.Context) (struct{}, error) {
		bare, err := gogit.PlainOpen(dir)
		if errors.Is(err, gogit.ErrRepositoryNotExists) {
			bare, err = gogit.PlainInit(dir, true)
		}
		if err != nil {
			return struct{}{}, err
		}
		origin := config.RemoteConfig{Name: "origin", URLs: []string{r.address}}
		if _, err := bare.CreateRemote(&origin); err != nil && !errors.Is(err, gogit.ErrRemoteExists) {
			return struct{}{}, err
		}
		bare.Storer = boundedStorage{bare.Storer.(*filesystem.Storage)}
		ref := plumbing.NewBranchReferenceName(r.branch)
		err = bare.FetchContext(ctx, &gogit.FetchOptions{
			RemoteURL: r.endpoint.String(),
			RefSpecs:  []config.RefSpec{config.RefSpec("+" + ref.String() + ":" + ref.String())},
			Tags:      gogit.NoTags,
			Force:     true,
			Auth:      auth,
			CABundle:  ca,
			Progress:  said,
		})
		if errors.Is(err, gogit.NoErrAlreadyUpToDate) {
			err = nil
		}
		return struct{}{}, err
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errHung):
		r.mu.Lock()
		if r.cache == dir { // what hangs may still write there
			r.cache = ""
		}
		r.mu.Unlock()
	default: // go-git leaves what it could not finish, and every further try would add to it
		cut, _ := filepath.Glob(filepath.Join(dir, unfinished))
		for _, name := range cut {
			err = errors.Join(err, os.Remove(name))
		}
	}
	if errors.Is(context.Cause(ctx), errStalled) {
		return fmt.Errorf("%w for %v", errStalled, r.stall)
	}
	return err
}

// counter counts what a server says of its progress.
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

var errHung = errors.New("the server does not answer")

// patient runs f, but waits no longer than timeout, nor beyond ctx: go-git's ssh looks at neither while it reads.
func patient[T any](ctx context.Context, r *remoteRepo, timeout time.Duration, f func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	select {
	case r.hung <- struct{}{}:
	case <-ctx.Done():
		return none, fmt.Errorf("%w: %d earlier calls still wait for it", errHung, maxHung)
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-r.hung }()
		value, err := f(ctx)
		done <- result{value, err}
	}()
	select {
	case got := <-done:
		return got.value, got.err
	case <-ctx.Done():
	}
	select { // what looks at ctx returns now
	case got := <-done:
		return got.value, got.err
	case <-time.After(time.Second):
		return none, fmt.Errorf("%w: %w", errHung, ctx.Err())
	}
}

// isRemoteFault tells trouble of the network or the server from trouble of the cache.
func isRemoteFault(err error) bool {
	return errors.Is(err, errHung) || errors.Is(err, errStalled) || errors.Is(err, context.DeadlineExceeded) ||
		errors.As(err, new(net.Error)) || errors.As(err, new(*url.Error)) || errors.As(err, new(*hostKeyError)) ||
		errors.As(err, new(*objectTooLarge)) || errors.Is(err, transport.ErrRepositoryNotFound) || errors.Is(err, transport.ErrEmptyRemoteRepository) ||
		errors.Is(err, transport.ErrAuthenticationRequired) || errors.Is(err, transport.ErrAuthorizationFailed)
}

// explain adds what to do about it.
func (r *remoteRepo) explain(doing string, err error) error {
	hint := ""
	switch {
	case errors.As(err, new(*hostKeyError)):
	case errors.Is(err, transport.ErrAuthenticationRequired), errors.Is(err, transport.ErrAuthorizationFailed):
		hint = " (KEDGE_GIT_USER and KEDGE_GIT_TOKEN say who asks)"
	case errors.Is(err, transport.ErrRepositoryNotFound):
		hint = " (or it may not be seen with these credentials)"
	case strings.Contains(err.Error(), "unable to authenticate"):
		hint = " (the server doesn't accept this key for " + r.endpoint.User + ")"
	case strings.Contains(err.Error(), "x509:"):
		hint = " (GIT_SSL_CAINFO names a file of further authorities)"
	}
	return fmt.Errorf("%s %s: %w%s", doing, r.address, err, hint)
}

// credentials reads keys and tokens anew each time, so that they can be replaced while the mirror runs.
func (a access) credentials(e *transport.Endpoint) (auth transport.AuthMethod, ca []byte, err error) {
	if e.Protocol == "ssh" {
		auth, err = a.ssh(e)
		return auth, nil, err
	}
	if a.caFile != "" {
		if ca, err = os.ReadFile(a.caFile); err != nil {
			return nil, nil, fmt.Errorf("certificate authorities: %w", err)
		}
	}
	token, err := Secret(a.env, "KEDGE_GIT_TOKEN")
	if err != nil || token == "" {
		return nil, ca, err
	}
	user := a.env("KEDGE_GIT_USER")
	if user == "" {
		user = "kedge" // hosts that take a token alone ignore the name, but want one
	}
	return &githttp.BasicAuth{Username: user, Password: token}, ca, nil
}

// Secret reads the variable name, or else the file that NAME_FILE names. A file that is named but empty is an error: it is more
// likely to be half written than to mean that there is no secret.
func Secret(env func(string) string, name string) (string, error) {
	if value := env(name); value != "" {
		return value, nil
	}
	file := env(name + "_FILE")
	if file == "" {
		return "", nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", name, err)
	}
	value := strings.TrimSpace(string(data))
	if value == "" {
		return "", fmt.Errorf("%s_FILE: %s is empty", name, file)
	}
	return value, nil
}

func (a access) ssh(e *transport.Endpoint) (transport.AuthMethod, error) {
	files := []string{a.knownHosts}
	if a.knownHosts == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, fmt.Errorf("known hosts: %w", err)
		}
		files = nil
		for _, file := range []string{filepath.Join(home, ".ssh", "known_hosts"), "/etc/ssh/ssh_known_hosts"} {
			if _, err := os.Stat(file); err == nil {
				files = append(files, file)
			}
		}
		if len(files) == 0 {
			return nil, fmt.Errorf("known hosts: there is no ~/.ssh/known_hosts to check the key of %s against: name a file with --known-hosts", e.Host)
		}
	}
	known, err := gitssh.NewKnownHostsDb(files...)
	if err != nil {
		return nil, fmt.Errorf("known hosts: %w", err)
	}
	port := e.Port
	if port == 0 {
		port = gitssh.DefaultPort
	}
	host := net.JoinHostPort(e.Host, fmt.Sprint(port))
	check := gitssh.HostKeyCallbackHelper{
		HostKeyCallback:   strict(known.HostKeyCallback(), files),
		HostKeyAlgorithms: known.HostKeyAlgorithms(host),
	}
	if a.sshKey == "" {
		agent, err := gitssh.NewSSHAgentAuth(e.User)
		if err != nil {
			return nil, fmt.Errorf("ssh: no key file is named and no SSH agent answers: name one with --ssh-key (%w)", err)
		}
		agent.HostKeyCallbackHelper = check
		return agent, nil
	}
	pem, err := os.ReadFile(a.sshKey)
	if err != nil {
		return nil, fmt.Errorf("ssh key: %w", err)
	}
	key, err := ssh.ParsePrivateKey(pem)
	if errors.As(err, new(*ssh.PassphraseMissingError)) {
		return nil, fmt.Errorf("ssh key %s has a passphrase, and nobody is here to type it: use a key of its own for the mirror, or an SSH agent", a.sshKey)
	}
	if err != nil {
		return nil, fmt.Errorf("ssh key %s: %w", a.sshKey, err)
	}
	return &gitssh.PublicKeys{User: e.User, Signer: key, HostKeyCallbackHelper: check}, nil
}

// hostKeyError says that a server isn't, or may not be, who it should be.
type hostKeyError struct{ text string }

func (e *hostKeyError) Error() string { return e.text }

// strict refuses hosts that the files don't name, and says what to do about it.
func strict(check ssh.HostKeyCallback, files []string) ssh.HostKeyCallback {
	return func(host string, remote net.Addr, key ssh.PublicKey) error {
		err := check(host, remote, key)
		var mismatch *knownhosts.KeyError
		switch {
		case !errors.As(err, &mismatch):
			return err
		case len(mismatch.Want) == 0:
			return &hostKeyError{fmt.Sprintf("%s is not in %s: make sure that its key is %s, then add it (ssh-keyscan prints it)",
				host, strings.Join(files, " or "), ssh.FingerprintSHA256(key))}
		default:
			return &hostKeyError{fmt.Sprintf("the key of %s is not the one in %s:%d: it is %s, and somebody may be listening in",
				host, mismatch.Want[0].Filename, mismatch.Want[0].Line, ssh.FingerprintSHA256(key))}
		}
	}
}

// redact takes a password out of an address that is about to be shown.
func redact(address string) string {
	if u, err := url.Parse(address); err == nil && u.User != nil {
		u.User = url.User("...")
		return u.String()
	}
	return address
}
