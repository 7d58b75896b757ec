package git

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
	"kedge/deployments/safetext"
)

// Commit is a checked Git commit: its deployments tree, and what is shown of it to people and kept in the history.
type Commit struct {
	Hash    string    // the full hash
	Author  string    // NAME <EMAIL>
	When    time.Time // when it was committed, by the committer's clock
	Subject string
	Tree    *deployments.Tree
	// Past has the newest ancestors' hashes, 12 digits each, separated by spaces: at most maxPast. It has fewer if the
	// history is short or has a gap.
	Past string
}

// BadCommit means that a commit's content or signature is invalid, or that the commit is too large to be fetched. It is
// also the error if the signers' files can't be read. A retry helps only once the signers' files have changed.
type BadCommit struct {
	Hash string
	Err  error
}

func (e *BadCommit) Error() string { return e.Err.Error() }
func (e *BadCommit) Unwrap() error { return e.Err }

// Load reads a commit by its full hash, and checks it as a whole. Its tree must be valid and, if signers is not nil,
// its signature must be valid now; otherwise the error is a *BadCommit. After any other error a retry may help.
func (o *Objects) Load(name string, signers *Signers) (*Commit, error) {
	if signers == nil {
		return o.loadWith(name, nil)
	}
	return o.loadWith(name, signers.verify)
}

// LoadTaken reads a commit that a mirror has taken before, that is, copied to the store, so that the mirror can go on
// with it. The commit's signature may have become invalid since: see Signers.verifyTaken. Otherwise it works as Load.
func (o *Objects) LoadTaken(name string, signers *Signers) (*Commit, error) {
	if signers == nil {
		return o.loadWith(name, nil)
	}
	return o.loadWith(name, signers.verifyTaken)
}

// verifier returns an error unless a commit's signature is valid. payload is the commit without the signature, and when
// is the time of the commit.
type verifier func(hash string, payload, signature []byte, when time.Time) error

func (o *Objects) loadWith(name string, verify verifier) (*Commit, error) {
	hash := plumbing.NewHash(name)
	c, err := o.load(hash, verify)
	if err != nil {
		return nil, o.explain(err)
	}
	c.Past = past(o, hash)
	return c, nil
}

func (o *Objects) load(hash plumbing.Hash, verify verifier) (*Commit, error) {
	bad := func(err error) (*Commit, error) { return nil, &BadCommit{hash.String(), err} }
	raw, err := o.EncodedObject(plumbing.CommitObject, hash)
	switch {
	case errors.Is(err, plumbing.ErrObjectNotFound) && o.HasEncodedObject(hash) == nil:
		return bad(fmt.Errorf("%s is no commit, but an object of another kind, such as a tag: push a commit", hash))
	case err != nil:
		return nil, fmt.Errorf("commit %s: %w", hash, err)
	case raw.Size() > maxFile:
		return bad(fmt.Errorf("commit %s has %d bytes, without its files: at most %d are allowed", hash, raw.Size(), maxFile))
	}
	commit, err := object.DecodeCommit(o, raw)
	switch {
	case errors.Is(err, object.ErrMalformedCommit):
		return bad(fmt.Errorf("commit %s: %w", hash, err))
	case err != nil:
		return nil, fmt.Errorf("commit %s: %w", hash, err)
	}
	if verify != nil {
		payload, signature, err := signedPart(raw)
		if err != nil {
			return nil, fmt.Errorf("commit %s: %w", hash, err)
		}
		if err := verify(hash.String(), payload, signature, commit.Committer.When); err != nil {
			return bad(fmt.Errorf("signature of commit %s: %w", hash, err))
		}
	}
	fsys := newTree(o, commit, o.subdir)
	if top, err := fsys.Stat("."); fsys.fault == nil && o.subdir != "." && (err != nil || !top.IsDir()) {
		return bad(fmt.Errorf("commit %s has no directory %s, which --path names", hash, o.subdir))
	}
	tree, err := deployments.Load(fsys)
	prefix(o.subdir, tree, err)
	switch {
	case fsys.fault != nil:
		return nil, fmt.Errorf("commit %s: %w", hash, fsys.fault)
	case errors.As(err, new(deployments.Problems)):
		return bad(err)
	case err != nil: // the repository could be read: a dangling link, a broken tree
		return bad(fmt.Errorf("commit %s: %w", hash, err))
	}
	return describe(commit, tree), nil
}

func describe(c *object.Commit, tree *deployments.Tree) *Commit {
	subject, _, _ := strings.Cut(strings.TrimSpace(c.Message), "\n")
	return &Commit{
		Hash:    c.Hash.String(),
		Author:  safetext.Line(fmt.Sprintf("%s <%s>", c.Author.Name, c.Author.Email), 200),
		When:    c.Committer.When.UTC(),
		Subject: safetext.Line(subject, 200),
		Tree:    tree,
	}
}

// signedPart splits a commit's own bytes into the part that was signed and the signature, as git verify-commit does.
// It doesn't rebuild the payload from parsed fields, because that could lack content that no field has. signature is
// empty if the commit is not signed.
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

// splitSignature returns a commit's bytes without the first gpgsig header, and that header's value with its
// continuation lines. signature is nil if there is no such header.
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
		case len(line) == 0: // the message follows, whose lines may look like headers
			return append(payload, raw...), signature
		default:
			inside = false
			payload = append(payload, raw[:size]...)
		}
		raw = rest
	}
	return payload, signature
}

// maxPast bounds the hashes in Commit.Past. More commits are hardly ever pushed while somebody waits for one of them.
const maxPast = 30

// past returns the text of Commit.Past for the commit hash. It may lack what ancestors leaves out.
func past(in storer.EncodedObjectStorer, hash plumbing.Hash) string {
	var names []string
	for _, h := range ancestors(in, hash, maxPast+1) {
		if h != hash {
			names = append(names, h.String()[:12])
		}
	}
	return strings.Join(names, " ")
}

// ancestors returns a commit and its newest ancestors, at most n in all; nil if the commit can't be
// read. It stops before a commit whose parent is missing in the repository.
func ancestors(in storer.EncodedObjectStorer, hash plumbing.Hash, n int) (all []plumbing.Hash) {
	head, err := object.GetCommit(in, hash)
	if err != nil {
		return nil
	}
	commits := object.NewCommitIterCTime(head, nil, nil)
	defer commits.Close()
	for len(all) < n {
		c, err := commits.Next()
		if err != nil {
			break
		}
		all = append(all, c.Hash)
	}
	return all
}

// Descends reports whether the commits from and to are the same, or from is an ancestor of to. It visits the newest
// commits first, so that the usual answer needs few reads, however long the history is. Commits that differ only in
// their signatures count as one: whoever may push can change a signature's text. Such a change must not make the
// signer's own commit look like another history. The error wraps ErrGap if the commit to is missing, or if the walk
// meets a missing commit before it has read the commit from and its parents. If the repository lacks the commit from,
// that alone is no error.
func (o *Objects) Descends(ctx context.Context, from, to string) (bool, error) {
	if from == to {
		return true, nil
	}
	ancestor, err := o.readSignedContent(from)
	if err != nil {
		return false, err
	}
	head, err := object.GetCommit(o, plumbing.NewHash(to))
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		return false, o.explain(fmt.Errorf("commit %s: %w: %w", to, ErrGap, err))
	} else if err != nil {
		return false, fmt.Errorf("commit %s: %w", to, err)
	}
	commits := object.NewCommitIterCTime(head, nil, nil)
	defer commits.Close()
	for {
		c, err := commits.Next()
		switch {
		case errors.Is(err, io.EOF):
			return false, nil
		case errors.Is(err, plumbing.ErrObjectNotFound):
			return false, o.explain(fmt.Errorf("history of commit %s: %w: %w", to, ErrGap, err))
		case err != nil:
			return false, fmt.Errorf("history of commit %s: %w", to, err)
		case ancestor.is(o, c):
			return true, nil
		case ctx.Err() != nil:
			return false, context.Cause(ctx)
		}
	}
}

// signedContent is a commit's content without its signature.
type signedContent struct {
	hash    plumbing.Hash
	tree    plumbing.Hash
	payload []byte // nil: only hash is known, as the commit is missing, malformed or too large
}

// readSignedContent reads the signed content of the commit with the hash name. For a missing, malformed or too large
// commit it returns only the hash, and no error.
func (o *Objects) readSignedContent(name string) (signedContent, error) {
	s := signedContent{hash: plumbing.NewHash(name)}
	raw, err := o.EncodedObject(plumbing.CommitObject, s.hash)
	if errors.Is(err, plumbing.ErrObjectNotFound) || err == nil && raw.Size() > maxFile {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("commit %s: %w", name, err)
	}
	commit, err := object.DecodeCommit(o, raw)
	if errors.Is(err, object.ErrMalformedCommit) {
		return s, nil
	}
	if err == nil {
		s.tree = commit.TreeHash
		s.payload, _, err = signedPart(raw)
	}
	if err != nil {
		return s, fmt.Errorf("commit %s: %w", name, err)
	}
	return s, nil
}

// is reports whether c, a commit of o, is the commit of s, apart from the signature.
func (s signedContent) is(o *Objects, c *object.Commit) bool {
	if c.Hash == s.hash || s.payload == nil || c.TreeHash != s.tree {
		return c.Hash == s.hash
	}
	raw, err := o.EncodedObject(plumbing.CommitObject, c.Hash)
	if err != nil {
		return false
	}
	payload, _, err := signedPart(raw)
	return err == nil && bytes.Equal(payload, s.payload)
}
