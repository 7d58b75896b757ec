package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"kedge/deployments"
	"kedge/sync/git"
)

// CheckPush is a pre-receive hook: it reads "OLD NEW REF" lines from stdin, as githooks(5) gives them, and refuses
// what the mirror would not take: an invalid tree, a rewritten history, a removal of too many units, the removal of
// the branch. Only branches are looked at: those given, or else main and the one that HEAD names. path is as
// Config.Path. With releases it refuses as well what Releases.Check says of those that the push changes. It runs in
// the receiving repository's environment, where pushed objects lie in a quarantine.
func CheckPush(
	ctx context.Context,
	repoDir, path string,
	stdin io.Reader,
	releases *Releases,
	branches ...string,
) error {
	from, likely, err := git.OpenReceiving(repoDir, path, os.Getenv)
	if err != nil {
		return err
	}
	defer from.Close()
	if len(branches) == 0 {
		branches = likely
	}
	updates, err := git.ReadUpdates(stdin)
	refusals := []error{err}
	for _, u := range updates {
		if !slices.Contains(branches, u.Branch) {
			continue
		}
		if err := checkUpdate(ctx, from, releases, u); err != nil {
			refusals = append(refusals, fmt.Errorf("branch %s is not updated:\n%w", u.Branch, err))
		}
	}
	return errors.Join(refusals...)
}

// checkUpdate checks one branch's move.
func checkUpdate(ctx context.Context, from *git.Objects, releases *Releases, u git.Update) error {
	if u.New == "" {
		return errors.New("it is what the mirror follows, and can't be removed")
	}
	to, err := from.Load(u.New, nil)
	if err != nil {
		return err
	}
	var before *deployments.Tree // nil: there is none that sets rules, or has releases that were looked at
	if u.Old != "" {
		last, err := from.Load(u.Old, nil)
		switch {
		case errors.As(err, new(*git.BadCommit)): // it was not taken
		case err != nil:
			return err
		default:
			before = last.Tree
			m := candidate{from: last.Hash, rules: rulesOf(last), to: to}
			for _, u := range before.Units {
				m.had = append(m.had, u.ID)
			}
			if m.descends, err = from.Descends(ctx, u.Old, u.New); err != nil {
				return err
			}
			if err := refuse(m); err != nil {
				return err
			}
		}
	}
	if releases == nil {
		return nil
	}
	tree := *to.Tree
	tree.Units = changed(before, to.Tree)
	return releases.Check(ctx, &tree)
}
