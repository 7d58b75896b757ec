package transport

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// maxWords bounds what is told of a server's own answer, in bytes; maxAnswer what is read of it.
const (
	maxWords  = 300
	maxAnswer = 16 << 10
)

// Refusal is a server's answer that isn't Git's.
type Refusal struct {
	Status int           // of HTTP; 0: the server was asked by ssh
	Words  string        // the server's own, on one line
	Host   string        // who answered: another one than was asked, after a redirect
	After  time.Duration // how long it asks to be left alone; 0: it doesn't say
}

func (e *Refusal) Error() string {
	text := fmt.Sprintf("%s answers status code %d", e.Host, e.Status)
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

// hint returns what to do about a refusal.
func (e *Refusal) hint(address string, app bool) string {
	if asked, err := url.Parse(address); err == nil && e.Status != 0 && asked.Host != e.Host {
		return fmt.Sprintf(" (%s redirects to %s, where credentials don't follow: name the repository's address "+
			"there)", asked.Host, e.Host)
	}
	switch e.Status {
	case 0:
		return " (is the repository's path right, and may this key read it?)"
	case http.StatusUnauthorized, http.StatusForbidden:
		if app {
			return " (the key must be the GitHub App's, and its installation cover the repository and read contents)"
		}
		return " (KEDGE_GIT_USER and KEDGE_GIT_TOKEN say who asks)"
	case http.StatusNotFound:
		return " (or it may not be seen with these credentials)"
	case http.StatusOK:
		return " (is it a login page? the address is the one that git clone takes)"
	}
	return ""
}

// bare takes the method and the address off a Refusal: it names the host itself.
func bare(err error) error {
	if wrapped, ok := err.(*url.Error); ok && errors.As(err, new(*Refusal)) {
		return wrapped.Err
	}
	return err
}
