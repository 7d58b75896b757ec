package transport

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// maxWords bounds the part of a server's own answer that is shown, and maxAnswer the part that is read, both in bytes.
const (
	maxWords  = 300
	maxAnswer = 16 << 10
)

// Refusal is the error if a server answers with an HTTP error or an HTML page, or if it ends a
// session of ssh with an error text.
type Refusal struct {
	Status int           // of HTTP; 0: ssh
	Words  string        // the server's text, on one line
	Host   string        // the host that answered; after a redirect, the host that it leads to
	After  time.Duration // how long to wait, as the server asked, at most maxRetryAfter; 0: it didn't ask
}

func (e *Refusal) Error() string {
	text := fmt.Sprintf("%s answers with status code %d", e.Host, e.Status)
	switch e.Status {
	case 0:
		text = e.Host + " answers"
	case http.StatusOK:
		text = e.Host + " answers with a page for people, not as a Git server"
	}
	if e.Words != "" {
		text += ": " + e.Words
	}
	return text
}

// hint returns what to do about a refusal of the repository at address, in parentheses; empty: unknown.
func (e *Refusal) hint(address string, app bool) string {
	if asked, err := url.Parse(address); err == nil && e.Status != 0 && asked.Host != e.Host {
		return fmt.Sprintf(" (%s redirects to %s, and credentials aren't sent there: give the repository's address on "+
			"that host)", asked.Host, e.Host)
	}
	switch e.Status {
	case 0:
		return " (is the repository's path right, and may this key read it?)"
	case http.StatusUnauthorized, http.StatusForbidden:
		if app {
			return " (is the key the GitHub App's, and may its installation read the contents of this repository?)"
		}
		return " (are KEDGE_GIT_USER and KEDGE_GIT_TOKEN set, valid, and allowed to read the repository?)"
	case http.StatusNotFound:
		return " (is the address right, and may these credentials read the repository?)"
	case http.StatusOK:
		return " (is it a login page? give the address that git clone takes)"
	}
	return ""
}

// bare removes the *url.Error around a Refusal: its method and address aren't needed, as the Refusal names the host.
// Other errors stay as they are.
func bare(err error) error {
	if wrapped, ok := err.(*url.Error); ok && errors.As(err, new(*Refusal)) {
		return wrapped.Err
	}
	return err
}
