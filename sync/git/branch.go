// Package git reads the deployments repo: a branch, local or remote, as commits whose trees and signatures are
// checked. A remote branch is fetched by packages transport and pack into a cache. Objects reads the cache, or a
// local repository in place; its method Load checks a commit's tree and signature.
//
// What was tested, by the tests of this package and sync/mirror, and with what:
//
//	feature                               tested with
//	https, token, further authorities     git http-backend behind TLS and basic authentication
//	client certificates, replaced         the same, with TLS that asks for one
//	ssh, keys, known_hosts                OpenSSH's sshd
//	a local bare repo, watched            git init --bare, packed, repacked, with alternates, linked work trees
//	protocol v2: one branch, one          git http-backend, and sshd with AcceptEnv GIT_PROTOCOL, with 20,000
//	  connection for all polls              other references
//	protocol v0 over ssh                  sshd without AcceptEnv GIT_PROTOCOL
//	protocol v0 alone, insisting on       git http-backend behind a front that strips v2 and refuses without multi_ack,
//	  multi_ack (Azure DevOps, CodeCommit)  as these services document; the services themselves were not tried
//	GitHub App                            a local server that checks the JWT and makes tokens as GitHub documents it
//	large files elsewhere                 git http-backend with uploadpack.allowFilter, which GitHub and GitLab set,
//	                                        and without; sshd
//	Retry-After, refusals, login pages,   a front that answers so
//	  redirects
//	SSH and OpenPGP signatures            git and ssh-keygen; gpg
//
// Not supported: repositories with sha256 objects, reftable, partial clones as a local repo, the git:// protocol,
// and plain http to other machines.
package git

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
)

// Branch is a branch in Git, as a source of commits. A local repository is read in place, a remote one through a cache.
type Branch interface {
	// Head makes the branch's newest commit available to Objects, and returns its hash. The error wraps ErrNoBranch if
	// the branch doesn't exist, or a *BadCommit if the commit, or its history, is too large to be fetched.
	Head(ctx context.Context) (string, error)
	// Objects opens the repository for one reading. The caller closes the result.
	Objects() (*Objects, error)
	// Distrust tells the Branch that what Objects returned could not be read, or that its history
	// has a gap. The next Head rebuilds the cache of a remote repository. A local repository has no
	// cache, and Distrust does nothing.
	Distrust()
	// Watch calls changed whenever the branch may have moved, until ctx ends. For a remote repository, which can't be
	// watched, it only waits until ctx ends.
	Watch(ctx context.Context, changed func())
	// Interval returns the time after which to call Head again if Watch reports no change before. It may change.
	Interval() time.Duration
	// Pause returns the least time between two calls of Head, however often they are triggered. The caller keeps to it.
	Pause() time.Duration
	Close() error
}

// Config says which branch is read, and how its repository is reached.
type Config struct {
	// Repo is the repository's address: https://…, ssh://… or git@HOST:PATH, or the path of a local repository. No
	// object of a remote repository that is larger than 16 MiB is kept. Branch is the branch's name.
	Repo, Branch string
	// Path is the directory of the repository that holds STAGE/ROLE/UNIT.yaml and kedge.yaml; default: the root.
	Path string
	// Every is the time between polls; default 15 s, or 60 s for a local repo (at most 1 s while it can't be watched).
	Every time.Duration
	// SSHKey is the file of a private key; default: the SSH agent. KnownHosts is a known_hosts file; default:
	// ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts, as far as they exist.
	SSHKey, KnownHosts string
	// CacheDir keeps a remote repository's objects; default: a temporary directory, which Close removes.
	CacheDir string
	// Env returns the value of an environment variable. KEDGE_GIT_USER, KEDGE_GIT_TOKEN and KEDGE_GIT_TOKEN_FILE have the
	// credentials for https. GIT_SSL_CAINFO, GIT_SSL_CERT and GIT_SSL_KEY name files, as in git(1). KEDGE_GITHUB_APP_ID,
	// KEDGE_GITHUB_APP_INSTALLATION and KEDGE_GITHUB_APP_KEY_FILE configure a GitHub App, whose tokens are used instead.
	// KEDGE_GITHUB_API is the address of GitHub's API; default: https://api.github.com, or for other hosts
	// https://HOST/api/v3. Env must not be nil for a remote repository.
	Env func(string) string
	Log *slog.Logger // must not be nil
}

// Open checks c, and returns the branch that c names. It does not wait for the repository to be reachable.
func Open(c Config) (Branch, error) {
	if short, full := strings.CutPrefix(c.Branch, "refs/heads/"); full {
		c.Branch = short
	}
	if err := plumbing.NewBranchReferenceName(c.Branch).Validate(); err != nil {
		return nil, fmt.Errorf("branch %q: %w", c.Branch, err)
	}
	below, err := cleanPath(c.Path)
	if err != nil {
		return nil, err
	}
	if path, local := localPath(c.Repo); local {
		if c.Every == 0 {
			c.Every = time.Minute
		}
		return &localRepo{path: path, subdir: below, branch: c.Branch, every: c.Every, log: c.Log}, nil
	}
	if c.Every == 0 {
		c.Every = 15 * time.Second
	}
	r, err := newRemoteRepo(c, below)
	if err != nil {
		return nil, err
	}
	return r, nil
}
