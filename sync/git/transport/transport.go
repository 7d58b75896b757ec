// Package transport reads branches and packs from a remote Git repository by https or ssh. It speaks protocol v2 if
// the server does, else v0.
package transport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/transport"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// server is the host of a remote repository. A call ends with its context.
type server interface {
	// Heads returns the hashes of the branches whose full names begin with prefix, by full name.
	Heads(ctx context.Context, prefix string) (map[string]string, error)
	// Fetch requests the pack for q, and returns a reader of the pack and the commit that the pack brings. By protocol
	// v2 that commit is q.Want, by v0 the branch's present head. The caller closes the reader.
	Fetch(ctx context.Context, q Query) (io.ReadCloser, plumbing.Hash, error)
	Close()
}

// Repository is a remote repository.
type Repository struct {
	server
	endpoint transport.Endpoint
	address  string
	app      bool   // requests by https are authenticated as a GitHub App
	sshKey   string // the file of the key; empty: the SSH agent has it
}

// Open returns the repository at an address: https://…, ssh://… or git@HOST:PATH, or http://… on this machine. It
// checks the address, but does not wait for the server.
func Open(address string, a Access) (*Repository, error) {
	if trimmed := strings.TrimRight(address, "/"); strings.Contains(address, "://") {
		address = trimmed // with a slash go-git would request PATH//info/refs
	}
	if !strings.Contains(address, "://") && safetext.URLs(address) != address {
		return nil, fmt.Errorf("repository %q: want https://HOST/PATH, ssh://HOST/PATH or USER@HOST:PATH",
			Redact(address))
	}
	endpoint, err := transport.NewEndpoint(address)
	if err != nil {
		return nil, fmt.Errorf("repository %q: %s", Redact(address), safetext.URLs(err.Error()))
	}
	web := endpoint.Protocol == "https" || endpoint.Protocol == "http"
	if web && strings.ContainsAny(address, "?#") {
		return nil, fmt.Errorf("repository %q: want an address without a query and a fragment", Redact(address))
	}
	if web && (endpoint.User != "" || endpoint.Password != "") {
		return nil, fmt.Errorf("repository %s carries a user name or password: give them as KEDGE_GIT_USER and "+
			"KEDGE_GIT_TOKEN", Redact(address))
	}
	switch endpoint.Protocol {
	case "https":
	case "http":
		if ip := net.ParseIP(endpoint.Host); endpoint.Host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, fmt.Errorf("repository %s: plain http is allowed only for a repository on this machine: use https://",
				Redact(address))
		}
	case "ssh":
		if endpoint.Password != "" || strings.Contains(endpoint.User, ":") { // the latter of USER:PASSWORD@HOST:PATH
			return nil, fmt.Errorf("repository %s carries a password: use a key", Redact(address))
		}
		if endpoint.User == "" {
			endpoint.User = "git"
		}
	default:
		return nil, fmt.Errorf("repository %s: %s is not one of https, ssh, file or a path", Redact(address),
			endpoint.Protocol)
	}
	r := &Repository{endpoint: *endpoint, address: address, app: a.Env("KEDGE_GITHUB_APP_ID") != "", sshKey: a.SSHKey}
	if endpoint.Protocol == "ssh" {
		r.server = &sshServer{endpoint: *endpoint, access: a}
	} else {
		r.server = &httpServer{endpoint: *endpoint, access: a}
	}
	return r, nil
}

// Address returns the repository's address; a URL has no slash at its end.
func (r *Repository) Address() string { return r.address }

// Explain returns err with what was being done (doing), the repository's address and, if known, what to do about it.
func (r *Repository) Explain(doing string, err error) error {
	hint := ""
	if unexpected := (*plumbing.UnexpectedError)(nil); errors.As(err, &unexpected) { // the type doesn't implement Unwrap
		err = unexpected.Err
	}
	err = bare(err)
	refusal := (*Refusal)(nil)
	switch {
	case errors.As(err, new(*hostKeyError)):
	case errors.As(err, &refusal):
		hint = refusal.hint(r.endpoint.String(), r.app)
	case errors.Is(err, transport.ErrAuthenticationRequired), errors.Is(err, transport.ErrAuthorizationFailed):
		hint = " (are KEDGE_GIT_USER and KEDGE_GIT_TOKEN set, valid, and allowed to read the repository?)"
	case errors.Is(err, transport.ErrRepositoryNotFound):
		hint = " (is the address right, and may these credentials read the repository?)"
	case strings.Contains(err.Error(), "unable to authenticate"):
		hint = fmt.Sprintf(" (the server accepts no key of %s for the user %s: add it to the repository's deploy keys, "+
			"or name another file with --ssh-key)", cmp.Or(r.sshKey, "the SSH agent"), r.endpoint.User)
	case strings.Contains(err.Error(), "x509:"):
		hint = " (if the server's certificate is of an authority of your own, name that authority's file in GIT_SSL_CAINFO)"
	}
	return fmt.Errorf("%s %s: %w%s", doing, r.address, err, hint)
}

// Redact replaces the user name and password by "..." in a URL that can be parsed. In other addresses it hides what
// deployments.ShownURL hides.
func Redact(address string) string {
	if u, err := url.Parse(address); err == nil && u.User != nil {
		u.User = url.User("...")
		return u.String()
	}
	return deployments.ShownURL(address)
}
