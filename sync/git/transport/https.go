package transport

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"

	"kedge/deployments/safetext"
)

const (
	infoRefs   = "/info/refs"
	uploadPack = "/git-upload-pack"
	// maxRetryAfter bounds how long a server may make the mirror wait.
	maxRetryAfter = 15 * time.Minute
)

// httpServer is a Git host behind https, or http on this machine. Its connections stay open between polls.
type httpServer struct {
	endpoint transport.Endpoint
	access   Access

	mu     sync.Mutex
	client *http.Client
	tls    tlsFiles          // the files that client was made with
	token  installationToken // the token of a GitHub App
	// v2URL is the URL that answers protocol v2, after redirects; empty: unknown, or the server
	// speaks v0.
	v2URL string
	hello greeting // of the server at v2URL
}

// Heads implements server. By protocol v2 it requests only the branches with the prefix; by v0 the server lists all
// references.
func (s *httpServer) Heads(ctx context.Context, prefix string) (map[string]string, error) {
	s.mu.Lock()
	v2URL := s.v2URL
	s.mu.Unlock()
	if v2URL == "" {
		heads, v2, hello, err := s.discover(ctx, prefix)
		if err != nil || v2 == "" {
			return heads, err
		}
		v2URL = v2
		s.mu.Lock()
		s.hello = hello
		s.mu.Unlock()
	}
	heads, err := s.lsRefs(ctx, v2URL, prefix)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.v2URL = v2URL; err != nil {
		s.v2URL = ""
	}
	return heads, err
}

// discover finds out which protocol the server speaks. If it speaks v2, v2 is the repository's URL after redirects, and
// hello the server's greeting. Otherwise v2 is empty, and heads are the branches.
func (s *httpServer) discover(ctx context.Context, prefix string) (heads map[string]string, v2 string,
	hello greeting, err error) {
	resp, err := s.do(ctx, http.MethodGet, s.endpoint.String()+infoRefs+"?service=git-upload-pack", nil)
	if err != nil {
		return nil, "", hello, err
	}
	defer resp.Body.Close()
	body := bufio.NewReader(resp.Body)
	start, _ := body.Peek(2048)
	if !bytes.Contains(start[:min(len(start), 64)], []byte(version2+"\n")) {
		refs, err := advertisedRefs(start, body)
		if err != nil {
			return nil, "", hello, err
		}
		return headsOf(refs, prefix), "", hello, nil
	}
	for line := ""; line != version2; { // the service's name and a flush may come first
		if _, line, err = readPkt(body); err != nil {
			return nil, "", hello, noEOF(err)
		}
	}
	if hello, err = readGreeting(body); err != nil {
		return nil, "", hello, err
	}
	at := *resp.Request.URL
	at.RawQuery, at.Path = "", strings.TrimSuffix(at.Path, infoRefs)
	return nil, at.String(), hello, nil
}

func (s *httpServer) lsRefs(ctx context.Context, at, prefix string) (map[string]string, error) {
	resp, err := s.do(ctx, http.MethodPost, at+uploadPack, strings.NewReader(lsRefs(prefix)))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	refs, err := readRefs(resp.Body, prefix)
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer)) // so that the connection is reused
	return refs, err
}

func (s *httpServer) Fetch(ctx context.Context, q Query) (io.ReadCloser, plumbing.Hash, error) {
	s.mu.Lock()
	v2URL, hello := s.v2URL, s.hello
	s.mu.Unlock()
	if v2URL == "" {
		return s.fetchV0(ctx, q)
	}
	resp, err := s.do(ctx, http.MethodPost, v2URL+uploadPack, strings.NewReader(hello.fetch(q)))
	if err != nil {
		return nil, q.Want, err
	}
	pack, err := packSection(resp.Body)
	if err != nil {
		resp.Body.Close()
		return nil, q.Want, err
	}
	return readCloser{pack, resp.Body}, q.Want, nil
}

func (s *httpServer) fetchV0(ctx context.Context, q Query) (io.ReadCloser, plumbing.Hash, error) {
	session, err := s.session(ctx)
	if err != nil {
		return nil, q.Want, err
	}
	refs, err := session.AdvertisedReferencesContext(ctx)
	if err != nil {
		return nil, q.Want, err
	}
	req, err := requestV0(refs, q)
	if err != nil {
		return nil, q.Want, err
	}
	pack, err := session.UploadPack(ctx, req)
	if err != nil {
		return nil, q.Want, err
	}
	return readCloser{demultiplexed(req, pack), pack}, req.Wants[0], nil
}

// readCloser reads from one stream, and closes another below it.
type readCloser struct {
	io.Reader
	io.Closer
}

func (s *httpServer) do(ctx context.Context, method, address string, body io.Reader) (*http.Response, error) {
	client, err := s.httpClient()
	if err != nil {
		return nil, err
	}
	auth, err := s.credentials(ctx, client)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", capability.DefaultAgent())
	req.Header.Set("Git-Protocol", "version=2")
	if body != nil {
		req.Header.Set("Content-Type", "application/x-git-upload-pack-request")
		req.Header.Set("Accept", "application/x-git-upload-pack-result")
	}
	if auth != nil {
		auth.SetAuth(req)
	}
	resp, err := client.Do(req)
	err = bare(err)
	if refusal := (*Refusal)(nil); errors.As(err, &refusal) && refusal.Status == http.StatusUnauthorized {
		s.mu.Lock()
		s.token = installationToken{} // the token may have been revoked
		s.mu.Unlock()
	}
	return resp, err
}

// credentials returns the credentials for a request; nil: none.
func (s *httpServer) credentials(ctx context.Context, client *http.Client) (*githttp.BasicAuth, error) {
	app, err := s.access.githubApp(s.endpoint.Host)
	if err != nil {
		return nil, err
	}
	if app == nil {
		return s.access.basicAuth()
	}
	s.mu.Lock()
	token := s.token
	s.mu.Unlock()
	if now := time.Now(); token.Expires.Sub(now) < renewBefore {
		if token, err = app.makeToken(ctx, client, now); err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.token = token
		s.mu.Unlock()
	}
	return &githttp.BasicAuth{Username: "x-access-token", Password: token.Token}, nil
}

// session begins a fetch by protocol v0.
func (s *httpServer) session(ctx context.Context) (transport.UploadPackSession, error) {
	endpoint := s.endpoint // go-git changes it after a redirect
	client, err := s.httpClient()
	if err != nil {
		return nil, err
	}
	auth, err := s.credentials(ctx, client)
	if err != nil {
		return nil, err
	}
	if auth == nil { // a nil pointer in an interface isn't nil
		return githttp.NewClient(client).NewUploadPackSession(&endpoint, nil)
	}
	return githttp.NewClient(client).NewUploadPackSession(&endpoint, auth)
}

// httpClient returns a client with the certificates that are in the files now.
func (s *httpServer) httpClient() (*http.Client, error) {
	files, err := s.access.readTLS()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client != nil && s.tls == files {
		return s.client, nil
	}
	config, err := files.config()
	if err != nil {
		return nil, err
	}
	s.closeIdle()
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.TLSClientConfig = config
	base.MaxIdleConnsPerHost = 1
	base.IdleConnTimeout = 5 * time.Minute // longer than between two polls, by default
	s.client = &http.Client{Transport: answers{base}, CheckRedirect: s.redirect}
	s.tls = files
	return s.client, nil
}

// Close closes idle connections.
func (s *httpServer) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeIdle()
}

func (s *httpServer) closeIdle() {
	if s.client != nil {
		s.client.CloseIdleConnections()
	}
}

// redirect follows up to nine redirects: to other hosts without credentials, and never from https to http.
func (s *httpServer) redirect(to *http.Request, via []*http.Request) error {
	from := via[0].URL
	if from.Scheme == "https" && to.URL.Scheme != "https" {
		return fmt.Errorf("the server redirects to plain http, at %s", to.URL.Host)
	}
	if len(via) >= 10 {
		return errors.New("the server redirects too often")
	}
	if from.Host != to.URL.Host {
		to.Header.Del("Authorization")
	}
	return nil
}

// answers passes on a server's answers, but turns an HTTP error and an HTML page into a Refusal.
type answers struct{ base *http.Transport }

func (a answers) CloseIdleConnections() { a.base.CloseIdleConnections() }

func (a answers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := a.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	page := resp.StatusCode == http.StatusOK && (kind == "text/html" || kind == "application/xhtml+xml")
	if resp.StatusCode < http.StatusBadRequest && !page {
		return resp, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	refusal := &Refusal{Status: resp.StatusCode, Words: words(req, kind, string(text)), Host: req.URL.Host}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		refusal.After = time.Duration(min(seconds, int(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(resp.Header.Get("Retry-After")); err == nil {
		refusal.After = min(max(0, time.Until(at)), maxRetryAfter)
	}
	return nil, refusal
}

var pageTitle = regexp.MustCompile(`(?is)<title[^>]*>(.*?)</title>`)

// words returns the text of an answer to req, on one line, cut to maxWords bytes; of an HTML page only the title. The
// password or token of the request is replaced by "...".
func words(req *http.Request, kind, text string) string {
	if strings.Contains(kind, "html") {
		title := pageTitle.FindStringSubmatch(text)
		if title == nil {
			return ""
		}
		text = title[1]
	}
	_, secret, basic := req.BasicAuth()
	if bearer, found := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer "); found && !basic {
		secret = bearer
	}
	if secret != "" {
		text = strings.ReplaceAll(strings.ReplaceAll(text, secret, "..."), url.QueryEscape(secret), "...")
	}
	return safetext.Line(strings.Join(strings.Fields(text), " "), maxWords)
}
