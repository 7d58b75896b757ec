package object

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"syscall"

	"kedge/deployments"
)

var (
	errPlainHTTP = errors.New("plain http is accepted only from this machine, and from URLs that the setting sources " +
		"allows: use https://")
	errToHere = errors.New("a redirect from another machine may not lead to this one")
	// errLocalAddress counts as ErrUnavailable, not as the release's fault, as a name may lead to another address
	// later.
	errLocalAddress = errors.New("the address is this machine's own, or link-local: a URL may lead there only if " +
		"the setting sources allows the URL, and a redirect from another machine never")

	errToPlainHTTP = errors.New("a redirect from https may not lead to plain http")
	errWithoutEnd  = fmt.Errorf("it is redirected too often: at most %d redirects are followed", maxRequests-1)
)

// maxRequests bounds the requests of one read: the first, and one for each redirect that it follows.
const maxRequests = 10

func thisMachine(u *url.URL) bool {
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
}

// mayRead reports whether a URL of plain http may be read: it names this machine, or one of Config.Sources covers it.
func (c *Client) mayRead(u *url.URL) bool {
	return thisMachine(u) || deployments.FromSource(u.String(), c.sources)
}

// redirectError says why a redirect isn't followed. It isn't transient.
type redirectError struct{ error }

func (e redirectError) Unwrap() error { return e.error }

type boundsKey struct{}

// WithRedirect returns a context whose reads check each redirect by allowed, in addition to Config.Redirect: for
// callers whose bounds depend on what is read.
func WithRedirect(ctx context.Context, allowed func(url string) error) context.Context {
	return context.WithValue(ctx, boundsKey{}, allowed)
}

// checkRedirect returns an error if a redirect leads from https to plain http, or if mayRead,
// Config.Redirect or WithRedirect refuses its URL. It also refuses the redirect after maxRequests-1
// others. A redirect from another machine to this one is refused, as it could reach a service that
// listens on this machine only. A request that is redirected to another host loses all headers but
// ownHeaders. The error doesn't show the URL that led there, which may contain a signature.
func (c *Client) checkRedirect(r *http.Request, via []*http.Request) error {
	r.Header.Del("Referer")
	if r.URL.Host != via[0].URL.Host {
		maps.DeleteFunc(r.Header, func(name string, _ []string) bool { return !slices.Contains(ownHeaders, name) })
	}
	from := via[len(via)-1].URL
	switch {
	case deployments.IsLocalURL(r.URL) && !thisMachine(from) && r.URL.Host != from.Host:
		return errToHere
	case r.URL.Scheme != "https" && from.Scheme == "https":
		return errToPlainHTTP
	case r.URL.Scheme != "https" && (r.URL.Scheme != "http" || !c.mayRead(r.URL)):
		return errPlainHTTP
	}
	if len(via) >= maxRequests {
		return errWithoutEnd
	}
	to := *r.URL
	to.User, to.RawQuery, to.ForceQuery, to.Fragment, to.RawFragment = nil, "", false, "", ""
	if c.redirect != nil {
		if err := c.redirect(to.String()); err != nil {
			return err
		}
	}
	if allowed, ok := r.Context().Value(boundsKey{}).(func(string) error); ok && allowed != nil {
		return allowed(to.String())
	}
	return nil
}

// httpClient returns a client that counts requests and checks each hop's address. If mayLeadHere
// accepts the first URL, that URL, and redirects on its host, may lead to this machine. Redirects
// to other hosts may do so only if the first URL also names this machine.
func (c *Client) httpClient(t *http.Transport, mayLeadHere func(*url.URL) bool) *http.Client {
	guarded, proxies := t.Clone(), &proxies{}
	guarded.Proxy = proxies.of(t.Proxy)
	dialer := dialer()
	dialer.ControlContext = refuseLocal
	guarded.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if proxies.has(address) { // this node's configuration names the proxy, which decides what it connects to
			return t.DialContext(ctx, network, address)
		}
		return dialer.DialContext(ctx, network, address)
	}
	return &http.Client{
		Transport: hops{free: t, guarded: guarded, mayLeadHere: mayLeadHere, requests: &c.requests},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if err := c.checkRedirect(r, via); err != nil {
				return redirectError{err}
			}
			return nil
		},
	}
}

// mayLeadHere reports whether the name in an http or https URL may resolve to this machine: see Config.NoLocal.
func (c *Client) mayLeadHere(u *url.URL) bool {
	if !c.noLocal {
		return true
	}
	to := *u
	to.User, to.RawQuery, to.ForceQuery = nil, "", false
	return deployments.FromSource(to.String(), c.sources)
}

// anyAddress is the mayLeadHere for services that this process's own configuration names.
func anyAddress(*url.URL) bool { return true }

func refuseLocal(_ context.Context, _, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err == nil && deployments.IsLocalAddress(at.Addr()) {
		err = errLocalAddress
	}
	return err
}

// isLocalAddress reports whether a request failed because refuseLocal refused an address of its host. Trying again in
// the same call doesn't help.
func isLocalAddress(err error) bool { return errors.Is(err, errLocalAddress) }

// hops sends requests on connections to any address, or on connections that never lead to this machine. The two
// kinds don't share connections, as a host's name may have led to this machine for an earlier request.
type hops struct {
	free, guarded *http.Transport
	mayLeadHere   func(*url.URL) bool
	requests      interface{ Add(int64) int64 }
}

func (h hops) RoundTrip(r *http.Request) (*http.Response, error) {
	h.requests.Add(1)
	first := r
	for first.Response != nil && first.Response.Request != nil { // redirected
		first = first.Response.Request
	}
	free := h.mayLeadHere(first.URL)
	if first.URL.Host != r.URL.Host {
		free = free && thisMachine(first.URL)
	}
	if free {
		return h.free.RoundTrip(r)
	}
	return h.guarded.RoundTrip(r)
}

// CloseIdleConnections implements http.Client's method of that name.
func (h hops) CloseIdleConnections() {
	h.free.CloseIdleConnections()
	h.guarded.CloseIdleConnections()
}

// proxies records the addresses of the proxies that requests used.
type proxies struct{ known sync.Map }

// of returns a Transport's Proxy function that records what next returns.
func (p *proxies) of(next func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	if next == nil {
		return nil
	}
	return func(r *http.Request) (*url.URL, error) {
		u, err := next(r)
		if err == nil && u != nil {
			port := u.Port()
			if port == "" {
				port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
			}
			if port == "" {
				port = "1080" // SOCKS
			}
			p.known.Store(net.JoinHostPort(u.Hostname(), port), true)
		}
		return u, err
	}
}

func (p *proxies) has(address string) bool {
	_, ok := p.known.Load(address)
	return ok
}
