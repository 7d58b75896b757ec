package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/go-git/go-git/v5/plumbing/storer"

	"kedge/deployments"
)

// Commit is what history and people are told of a Git commit.
type Commit struct {
	Hash    string    `json:"hash"` // in full
	Author  string    `json:"author"`
	When    time.Time `json:"when"` // when it was committed; the committer's clock
	Subject string    `json:"subject,omitempty"`
	Parents []string  `json:"parents,omitempty"`
}

// loaded is a commit whose tree is valid, and whose signature, where one is asked for, is good.
type loaded struct {
	Commit
	tree *deployments.Tree
	past string // as Status.Past
}

// badCommit says that a commit can't be taken, whenever it is looked at: its content is at fault, not the way to it.
type badCommit struct {
	hash string
	err  error
}

func (e *badCommit) Error() string { return e.err.Error() }
func (e *badCommit) Unwrap() error { return e.err }

// verifier checks a commit's signature: payload is the commit without it.
type verifier func(payload, signature []byte) error

// load reads and checks a commit as a whole. A *badCommit is for good; any other error may pass.
func load(from storer.EncodedObjectStorer, hash plumbing.Hash, verify verifier) (*loaded, error) {
	bad := func(err error) (*loaded, error) { return nil, &badCommit{hash.String(), err} }
	o, err := from.EncodedObject(plumbing.CommitObject, hash)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", hash, err)
	}
	if o.Size() > maxFile {
		return bad(fmt.Errorf("commit %s has %d bytes, without its files: at most %d are allowed", hash, o.Size(), maxFile))
	}
	commit, err := object.DecodeCommit(from, o)
	switch {
	case errors.Is(err, object.ErrMalformedCommit):
		return bad(fmt.Errorf("commit %s: %w", hash, err))
	case err != nil:
		return nil, fmt.Errorf("commit %s: %w", hash, err)
	}
	if verify != nil {
		payload, signature, err := signedPart(o)
		if err != nil {
			return nil, fmt.Errorf("commit %s: %w", hash, err)
		}
		if err := verify(payload, signature); err != nil {
			return bad(fmt.Errorf("signature of commit %s: %w", hash, err))
		}
	}
	fsys := newTreeFS(from, commit)
	tree, err := deployments.Load(fsys)
	switch {
	case fsys.fault != nil:
		return nil, fmt.Errorf("commit %s: %w", hash, fsys.fault)
	case errors.As(err, new(deployments.Problems)):
		return bad(err)
	case err != nil: // the repository gave what it was asked for: a link that leads nowhere, a broken tree
		return bad(fmt.Errorf("commit %s: %w", hash, err))
	}
	return &loaded{Commit: describe(commit), tree: tree}, nil
}

func describe(c *object.Commit) Commit {
	subject, _, _ := strings.Cut(strings.TrimSpace(c.Message), "\n")
	d := Commit{
		Hash:    c.Hash.String(),
		Author:  bound(fmt.Sprintf("%s <%s>", c.Author.Name, c.Author.Email), 200),
		When:    c.Committer.When.UTC(),
		Subject: bound(subject, 200),
	}
	for _, p := range c.ParentHashes {
		d.Parents = append(d.Parents, p.String())
	}
	return d
}

// bound cuts what others wrote to n bytes of printable text.
func bound(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n-3], "") + "..."
}

// signedPart splits a commit's own bytes into what was signed and the signature, as git verify-commit does: they must not
// be put together again from parsed fields, which need not be all that is there. signature is empty where there is none.
func signedPart(commit plumbing.EncodedObject) (payload, signature []byte, err error) {
	r, err := commit.Reader()
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	raw, err := io.ReadAll(r)
	if err != nil {
		return nil, nil, err
	}
	payload, signature = splitSignature(raw)
	return payload, signature, nil
}

// splitSignature takes the gpgsig header, and its continuation lines, out of a commit's bytes.
func splitSignature(raw []byte) (payload, signature []byte) {
	inside := false
	for len(raw) > 0 {
		line, rest, _ := bytes.Cut(raw, []byte("\n"))
		size := len(raw) - len(rest)
		switch {
		case inside && bytes.HasPrefix(line, []byte(" ")):
			signature = append(append(signature, line[1:]...), '\n')
		case bytes.HasPrefix(line, []byte("gpgsig ")) && signature == nil:
			inside = true
			signature = append(append(signature, line[len("gpgsig "):]...), '\n')
		case len(line) == 0: // the message follows, whose lines may look like anything
			return append(payload, raw...), signature
		default:
			inside = false
			payload = append(payload, raw[:size]...)
		}
		raw = rest
	}
	return payload, signature
}

// maxPast bounds Status.Past: more commits than are pushed while somebody waits for one.
const maxPast = 30

// past names the newest commits that hash descends from, as far as they can be read.
func past(in storer.EncodedObjectStorer, hash plumbing.Hash) string {
	head, err := object.GetCommit(in, hash)
	if err != nil {
		return ""
	}
	commits := object.NewCommitIterCTime(head, nil, nil)
	defer commits.Close()
	var names []string
	for len(names) < maxPast {
		c, err := commits.Next()
		if err != nil {
			break
		}
		if c.Hash != hash {
			names = append(names, short(c.Hash.String()))
		}
	}
	return strings.Join(names, " ")
}

// descends reports whether from is to, or an ancestor of it. It looks at the newest commits first, so that the usual answer
// costs a few reads, however long the history is.
func descends(ctx context.Context, in storer.EncodedObjectStorer, from, to plumbing.Hash) (bool, error) {
	if from == to {
		return true, nil
	}
	head, err := object.GetCommit(in, to)
	if err != nil {
		return false, fmt.Errorf("commit %s: %w", to, err)
	}
	commits := object.NewCommitIterCTime(head, nil, nil)
	defer commits.Close()
	for {
		c, err := commits.Next()
		switch {
		case errors.Is(err, io.EOF):
			return false, nil
		case err != nil:
			return false, fmt.Errorf("history of commit %s: %w", to, err)
		case c.Hash == from:
			return true, nil
		case ctx.Err() != nil:
			return false, context.Cause(ctx)
		}
	}
}
