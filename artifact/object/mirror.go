package object

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/deployments"
)

// Mirrors maps a URL prefix to the prefixes that are tried before it, in order.
type Mirrors map[string][]string

const (
	// A mirror is given up sooner than an object's own place.
	mirrorTries     = 2
	mirrorStall     = 3 * time.Second
	mirrorLeastRate = 64 << 10 // bytes a second
	// mirrorPause is how long a mirror that failed is tried only after the object's own place and the other mirrors.
	mirrorPause = time.Minute
)

// Check returns an error if a prefix has no mirrors, or if deployments.CheckURL refuses it or one of its mirrors.
func (m Mirrors) Check() error {
	for _, prefix := range slices.Sorted(maps.Keys(m)) {
		for _, p := range append([]string{prefix}, m[prefix]...) {
			if err := deployments.CheckURL(strings.TrimSuffix(p, "/") + "/x"); err != nil {
				return fmt.Errorf("mirrors of %s: %q: %w", deployments.ShownURL(prefix), deployments.ShownURL(p), err)
			}
		}
		if len(m[prefix]) == 0 {
			return fmt.Errorf("mirrors of %s: want a list of URL prefixes", deployments.ShownURL(prefix))
		}
	}
	return nil
}

// of returns the mirrors' prefixes for a URL, and the URL below each of them. It uses the longest prefix that covers
// the URL; if none does, both are nil.
func (m Mirrors) of(url string) (prefixes, urls []string) {
	longest := ""
	for prefix := range m {
		if deployments.UnderPrefix(url, prefix) && len(prefix) > len(longest) {
			longest = prefix
		}
	}
	if longest == "" {
		return nil, nil
	}
	rest := strings.TrimPrefix(url, strings.TrimSuffix(longest, "/"))
	for _, to := range m[longest] {
		urls = append(urls, strings.TrimSuffix(to, "/")+rest)
	}
	return m[longest], urls
}

// allows reports whether a URL lies below a mirror, so that a redirect may lead there.
func (m Mirrors) allows(url string) bool {
	for _, prefixes := range m {
		if deployments.FromSource(url, prefixes) {
			return true
		}
	}
	return false
}

// mirrors are a client's mirrors, and which of them failed lately.
type mirrors struct {
	byPrefix Mirrors
	// client reads from mirrors, with shorter timeouts than the client that they belong to.
	client *Client

	mu     sync.Mutex
	failed map[string]time.Time // when a mirror failed last, by prefix
}

// newMirrors returns the mirrors of a client. A mirror may redirect to another one, and NoLocal doesn't bind it.
func newMirrors(c Config, origin *Client) *mirrors {
	of, redirect := c.Mirrors, c.Redirect
	c.Mirrors, c.NoLocal = nil, false
	c.StallTimeout = min(origin.stall, mirrorStall)
	c.LeastRate = max(origin.least, mirrorLeastRate)
	c.Redirect = func(url string) error {
		if redirect == nil || of.allows(url) {
			return nil
		}
		return redirect(url)
	}
	client := New(c)
	client.maxTries, client.limit = mirrorTries, origin.limit
	return &mirrors{byPrefix: of, client: client, failed: map[string]time.Time{}}
}

// Source is one of the places that may have an object. Client reads it at URL.
type Source struct {
	*Client
	URL string
	// mirror is a mirror's prefix; empty: the object's own place.
	mirror string
}

// IsMirror reports whether s is a mirror, not the object's own place.
func (s Source) IsMirror() bool { return s.mirror != "" }

// Sources returns the places of an object in the order to try them: its mirrors, its own place, then
// mirrors that failed within mirrorPause. A mirror may return any bytes: use them only after
// checking the object's digest or signature.
func (c *Client) Sources(url string) []Source {
	own := Source{Client: c, URL: url}
	if c.mirrors == nil {
		return []Source{own}
	}
	prefixes, urls := c.mirrors.byPrefix.of(url)
	var first, last []Source
	c.mirrors.mu.Lock()
	defer c.mirrors.mu.Unlock()
	for i, prefix := range prefixes {
		s := Source{Client: c.mirrors.client, URL: urls[i], mirror: prefix}
		if at, ok := c.mirrors.failed[prefix]; ok && time.Since(at) < mirrorPause {
			last = append(last, s)
		} else {
			first = append(first, s)
		}
	}
	return slices.Concat(first, []Source{own}, last)
}

// NoteFailure records that the mirror s failed with err, so that it is tried last for mirrorPause. A missing object is
// only logged, and a source that is no mirror is left alone.
func (c *Client) NoteFailure(s Source, err error) {
	if !s.IsMirror() {
		return
	}
	var reason deployments.Reason // empty: the error says it
	switch {
	case errors.Is(err, deployments.ErrDigest):
		reason = deployments.ReasonDigestMismatch
	case errors.Is(err, ErrNotFound):
		c.log.Info("a mirror of the object storage lacks an object: asking the next source",
			"url", deployments.ShownURL(s.URL))
		return
	case errors.Is(err, ErrUnavailable), errors.Is(err, ErrDenied), errors.Is(err, context.DeadlineExceeded):
		reason = deployments.ReasonStorageUnavailable
	}
	c.mirrors.mu.Lock()
	c.mirrors.failed[s.mirror] = time.Now()
	c.mirrors.mu.Unlock()
	c.log.Warn("a mirror of the object storage failed: asking it last for a while",
		"mirror", deployments.ShownURL(s.mirror), "url", deployments.ShownURL(s.URL), "reason", reason, "error", err)
}

// EachSource calls try with each source of an object in turn, until try returns nil or ctx ends. A mirror that fails is
// passed to NoteFailure. If no try succeeds, the error is that of the object's own place; if ctx ends, of the last try.
func (c *Client) EachSource(ctx context.Context, url string, try func(Source) error) error {
	var own error
	for _, s := range c.Sources(url) {
		err := try(s)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if s.IsMirror() {
			c.NoteFailure(s, err)
		} else {
			own = err
		}
	}
	return own
}

// ReadPinned reads an object of at most max bytes from its mirrors or its own place, one after the other, until check
// accepts the object's bytes, and returns these. check must compare them with a known digest or signature, and return
// an error for any others. With an error, the caller must not use out.
func (c *Client) ReadPinned(
	ctx context.Context,
	url string,
	max int64,
	check func([]byte) error,
) (out []byte, err error) {
	err = c.EachSource(ctx, url, func(s Source) error {
		data, err := s.ReadAll(ctx, s.URL, max)
		if err == nil {
			err = check(data)
		}
		out = data
		return err
	})
	return out, err
}
