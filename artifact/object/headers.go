package object

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	"kedge/deployments/inputfile"
)

// headersVariable is the environment variable that names a file of headers, for https and for http
// to this machine. Its lines are HOST[:PORT] NAME: VALUE.
const headersVariable = "KEDGE_HTTP_HEADERS_FILE"

// ownHeaders are what kedge sends itself: a redirect carries them to any host, and no file may set them.
var ownHeaders = []string{"Range", "If-Match", "User-Agent", "Accept-Encoding"}

// connectionHeaders are about the connection, and no file may set them.
var connectionHeaders = []string{
	"Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Te", "Trailer",
}

// requestHeaders returns the headers that identify this node to a URL's server; nil: none. They are those of
// headersVariable's file, and netrc's password unless that file has Authorization. There are none for plain http to
// another machine. A redirect to another host lacks them.
func requestHeaders(u *url.URL) (http.Header, error) {
	h, err := netrcHeader(u)
	if err != nil {
		return nil, err
	}
	given, err := fileHeaders(u)
	if err != nil {
		return nil, fmt.Errorf("reading the headers for %s: %w", u.Hostname(), err)
	}
	if h == nil {
		return given, nil
	}
	maps.Copy(h, given)
	return h, nil
}

// isConfidential reports whether a secret may be sent to a URL: plain http to another machine would send it over the
// network in the clear.
func isConfidential(u *url.URL) bool { return u.Scheme == "https" || thisMachine(u) }

// fileHeaders returns the headers that headersVariable's file has for a URL's server; nil for plain http to another
// machine.
func fileHeaders(u *url.URL) (http.Header, error) {
	file := os.Getenv(headersVariable)
	if file == "" || !isConfidential(u) {
		return nil, nil
	}
	data, err := inputfile.ReadPrivate(headersVariable, file)
	if err != nil {
		return nil, err
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "http": "80"}[u.Scheme]
	}
	h, err := parseHeaders(data, net.JoinHostPort(strings.ToLower(u.Hostname()), port))
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", headersVariable, file, err)
	}
	return h, nil
}

// parseHeaders returns the headers that a file has for HOST:PORT; without a port, a line is about 443. Its errors quote
// no values, which may be secret.
func parseHeaders(data []byte, address string) (http.Header, error) {
	h := http.Header{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, inputfile.Max)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(strings.TrimPrefix(lines.Text(), "\ufeff"))
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		host, header, _ := cutSpace(line)
		name, value, ok := strings.Cut(header, ":")
		name, value = http.CanonicalHeaderKey(strings.TrimSpace(name)), strings.TrimSpace(value)
		switch {
		case !ok || name == "" || value == "" || strings.ContainsAny(host, "/@"):
			return nil, fmt.Errorf("line %d: want HOST NAME: VALUE, as in artifacts.example.com Authorization: Bearer …", n)
		case slices.ContainsFunc([]byte(name), notToken), slices.ContainsFunc([]byte(value), isControl):
			return nil, fmt.Errorf("line %d: the header has a character that HTTP does not allow in headers", n)
		case slices.Contains(ownHeaders, name), slices.Contains(connectionHeaders, name):
			return nil, fmt.Errorf("line %d: kedge sets %s itself: remove the line", n, name)
		}
		if _, _, err := net.SplitHostPort(host); err != nil {
			host = net.JoinHostPort(strings.Trim(host, "[]"), "443")
		}
		if strings.EqualFold(host, address) {
			h.Set(name, value)
		}
	}
	if lines.Err() != nil {
		return nil, errors.New("a line is too long")
	}
	return h, nil
}

func cutSpace(s string) (before, after string, found bool) {
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return s, "", false
	}
	return s[:i], strings.TrimSpace(s[i:]), true
}

func notToken(b byte) bool {
	letter := b|0x20 >= 'a' && b|0x20 <= 'z'
	return !letter && (b < '0' || b > '9') && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(b))
}

func isControl(b byte) bool { return b < ' ' && b != '\t' || b == 0x7f }
