package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/inputfile"
	"kedge/kv"
	"kedge/sync/fleet"
	"kedge/sync/git"
	"kedge/sync/mirror"
	"kedge/sync/mirror/inspect"
)

func (a *app) checkCommand() *cobra.Command {
	var manifests []string
	var signers, path string
	var preReceive, releases, archives, fix bool
	c := &cobra.Command{
		Use:   "check [REPO]",
		Short: "Validate a deployments repo, or a manifest",
		Long: `Checks the work tree at REPO (default .) as the mirror would check a commit of it, and prints every mistake with file, line
and column. Of a bare repo it checks HEAD.

As a hook of the repo that people push to, it refuses a bad push: put this in hooks/pre-receive:

  #!/bin/sh
  exec kedge check --pre-receive

It looks at pushes to $KEDGE_BRANCH, or to main and the branch that the repo's HEAD names.

With --releases it reads the manifest of each release as well (as a hook: of those that the push changes): whether it is there, has
the digest that the pointer says, and does only what kedge.yaml allows for its stage (sources, dests, users, commands). With
--signers it must bear a signature as well.

With --manifest it checks manifests instead, and names the traps in old ones of stretcher's: what a node would do otherwise. It
takes files, directories, URLs, and prefixes that end in a slash, of which it reads all that is called .yml or .yaml. With --archives it
fetches and unpacks their archives, too.

  kedge check --archives --manifest s3://acme-deploy/manifests/

With --fix it writes files as kedge would have them, and what comes of one URL or of standard input to standard output.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(manifests) > 0 {
				return a.checkManifests(cmd.Context(), append(manifests, args...), archives, fix)
			}
			if len(args) > 1 {
				return usagef("%s given: want kedge %s", count(len(args), "argument"), cmd.Use)
			}
			if archives || fix {
				return usagef("--archives and --fix are for --manifest")
			}
			dir := "."
			if len(args) == 1 {
				dir = args[0]
			}
			var look *inspect.Releases
			if releases || signers != "" {
				objects := object.New(object.Config{})
				trust, err := trustSigners(signers, objects, slog.New(slog.DiscardHandler))
				if err != nil {
					return err
				}
				look = &inspect.Releases{Objects: objects, Trust: trust}
			}
			if preReceive {
				return mirror.CheckPush(cmd.Context(), dir, path, a.stdin, look, strings.Fields(os.Getenv("KEDGE_BRANCH"))...)
			}
			if info, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("there is no directory %s to check: want that of a deployments repo", dir)
			} else if err != nil {
				return err
			} else if !info.IsDir() {
				return usagef("%s is a file: want a deployments repo's directory, or --manifest %s", dir, dir)
			}
			tree, err := loadTree(cmd.Context(), dir, path)
			if err == nil && look != nil {
				err = look.Check(cmd.Context(), tree)
			}
			if problems := deployments.Problems(nil); errors.As(err, &problems) {
				return a.printProblems(problems, fmt.Sprintf("in %s: the mirror would take nothing of it", dir))
			}
			if err != nil {
				return err
			}
			if a.json {
				if err := a.printJSON(deployments.Problems{}); err != nil {
					return err
				}
			}
			for _, warning := range tree.Warnings() {
				fmt.Fprintln(a.stderr, "warning: "+warning)
			}
			if len(tree.Units) == 0 {
				fmt.Fprintf(a.stderr, "%s: valid, but it has no units: there is no STAGE/ROLE/UNIT.yaml in it\n", dir)
				return nil
			}
			fmt.Fprintf(a.stderr, "%s: %s, all valid\n", dir, count(len(tree.Units), "unit"))
			if look == nil && len(inspect.Bounded(tree.Settings, tree.Units)) > 0 {
				fmt.Fprintln(a.stderr,
					"not checked: whether the releases keep to kedge.yaml's dests, users and commands; --releases checks that")
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringArrayVar(
		&manifests,
		"manifest",
		nil,
		"check this `manifest` instead: a file, a directory, a URL or a prefix; - for standard input; may be repeated",
	)
	f.BoolVar(&archives, "archives", false, "with --manifest: fetch and unpack the archives, too")
	f.BoolVar(&fix, "fix", false, "with --manifest: adapt it to kedge")
	f.BoolVar(&releases, "releases", false, "read the manifests of the releases, too")
	f.StringVar(&signers, "signers", "",
		"read the manifests of the releases, too: each must be signed by one of the signers in this allowed_signers `file`")
	f.BoolVar(&preReceive, "pre-receive", false, "read pushed refs from standard input, as Git's hook gets them")
	pathFlag(f, &path)
	a.jsonFlag(c, "the problems")
	return c
}

// printProblems prints found, as JSON with --json, and returns an error that counts them. where ends the error's text,
// but not with --json.
func (a *app) printProblems(found deployments.Problems, where string) error {
	if a.json {
		return errors.Join(a.printJSON(found), errors.New(count(len(found), "problem")))
	}
	for _, p := range found {
		a.printProblem(p)
	}
	return fmt.Errorf("%s %s", count(len(found), "problem"), where)
}

// printProblem prints a problem for people. Names in it come from a repo or a store that others write.
func (a *app) printProblem(p deployments.Problem) {
	fmt.Fprintln(a.stdout, fleet.CleanLines(p.Error()))
}

// inFile sets the file of the problems in err or, if err is another error, adds the file's name to its text.
func inFile(err error, file string) error {
	problems := deployments.Problems(nil)
	if !errors.As(err, &problems) {
		return fmt.Errorf("%s: %w", file, err)
	}
	for i := range problems {
		problems[i].File = file
	}
	return problems
}

// loadTree reads a work tree, or the commit at HEAD of a bare repo. Read as a directory, a bare repo would have no unit
// files, and so always be valid. A directory with .git counts as a work tree even if it contains the files of a bare
// repo. If it did not, whoever may push could make kedge check a tree other than the one that the mirror reads.
func loadTree(ctx context.Context, dir, path string) (*deployments.Tree, error) {
	if _, err := os.Lstat(filepath.Join(dir, ".git")); err == nil {
		return git.LoadDir(dir, path)
	}
	for _, name := range []string{"HEAD", "objects", "refs"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return git.LoadDir(dir, path)
		}
	}
	commit, err := git.LoadAt(ctx, dir, "HEAD", path)
	if err != nil {
		return nil, err
	}
	return commit.Tree, nil
}

// pathFlag adds the flag for repos that hold more than deployments.
func pathFlag(f *pflag.FlagSet, path *string) {
	f.StringVar(path, "path", os.Getenv("KEDGE_PATH"),
		"`directory` of the repo that holds STAGE/ROLE/UNIT.yaml and kedge.yaml (default: all of it)")
}

func (a *app) diffCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:   "diff [REPO [COMMIT]]",
		Short: "What a commit would change in the store",
		Long: `Compares COMMIT (default HEAD) of the repo at REPO (default .) with the records in the store: what the mirror would write.
What isn't committed isn't compared.`,
		Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			args = append(args, []string{".", "HEAD"}[len(args):]...)
			ctx := cmd.Context()
			commit, err := git.LoadAt(ctx, args[0], args[1], path)
			if err != nil {
				return err
			}
			store, err := a.openExisting()
			if err != nil {
				return err
			}
			defer store.Close()
			now, err := readRecords(ctx, store)
			switch {
			case errors.Is(err, kv.ErrEmpty):
				a.printMessage("no mirror has run yet: this is what the first one would write")
			case err != nil:
				return err
			}
			changes := mirror.Plan(commit.Tree, commit.Hash, now, time.Now())
			if a.json {
				return a.printJSON(changes)
			}
			writeChanges(a.stdout, commit.Hash, changes)
			if e, err := store.Get(ctx, kv.MirrorKey); err == nil {
				var s deployments.MirrorState
				if json.Unmarshal(e.Value, &s) == nil && s.Refused == commit.Hash {
					a.printMessage("the mirror refused this commit: %s", s.Error)
				}
			}
			return nil
		},
	}
	pathFlag(c.Flags(), &path)
	a.jsonFlag(c, "the changes")
	return c
}

// readRecords reads the store's current records. A record that doesn't parse counts as absent, as
// the mirror would replace it. Keys that name no unit are left out.
func readRecords(ctx context.Context, store kv.Store) (map[deployments.UnitID]deployments.Record, error) {
	entries, err := store.List(ctx, kv.DesiredPrefix)
	if err != nil {
		return nil, err
	}
	now := map[deployments.UnitID]deployments.Record{}
	for _, e := range entries {
		id, err := deployments.ParseUnitID(strings.TrimPrefix(e.Key, kv.DesiredPrefix))
		if err != nil {
			continue
		}
		if r, err := deployments.ParseRecord(e.Value); err == nil {
			now[id] = r
		}
	}
	return now, nil
}

func writeChanges(w io.Writer, commit string, changes []mirror.Change) {
	if len(changes) == 0 {
		fmt.Fprintf(w, "nothing: the store has all of commit %s\n", commit[:min(12, len(commit))])
	}
	for _, c := range changes {
		fmt.Fprintf(w, "%-7s %s\n", c.Kind, c.Unit)
		if c.Before != nil && (c.After == nil || c.Before.Target != c.After.Target) {
			fmt.Fprintf(w, "  - %s\n", c.Before.Target)
		}
		if c.After != nil && (c.Before == nil || c.Before.Target != c.After.Target) {
			fmt.Fprintf(w, "  + %s\n", c.After.Target)
		}
		if fields := changedFields(c); len(fields) > 0 {
			fmt.Fprintf(w, "    changes %s\n", strings.Join(fields, ", "))
		}
		if c.How != "" {
			fmt.Fprintf(w, "    %s\n", c.How)
		}
	}
}

// changedFields returns the fields of the unit file, apart from the release, that an update changes in the record.
// rollout is among them only if the unit file's rollout was added or removed: its fields are not in the record.
func changedFields(c mirror.Change) (names []string) {
	if c.Kind != "update" {
		return nil
	}
	for _, f := range []struct {
		name    string
		changed bool
	}{
		{"after", !slices.Equal(c.Before.After, c.After.After)},
		{"drift", c.Before.Drift != c.After.Drift},
		{"adopt", c.Before.Adopt != c.After.Adopt},
		{"rollout", c.Before.Paced != c.After.Paced},
	} {
		if f.changed {
			names = append(names, f.name)
		}
	}
	return names
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// readTemplate sets opt's template and manifest from a file. The template is the file's text, unchanged, with {{ env }}
// and {{ must_env }} for the nodes to fill in.
func readTemplate(file string, opt *artifact.PublishOptions) error {
	data, err := inputfile.ReadOnce("--manifest", file)
	if err != nil {
		return err
	}
	whole := data
	if json := bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")); !json &&
		!artifact.TemplateSets(data, "sync_strategy") {
		// Publishing will set the strategy release if the template sets none. Some fields are valid only with that strategy.
		whole = append(bytes.TrimRight(bytes.Clone(data), "\n"), "\nsync_strategy: "+deployments.StrategyRelease+"\n"...)
	}
	m, err := deployments.ParseTemplate(whole, "file:///manifest.yaml")
	if err != nil {
		return inFile(err, file)
	}
	opt.Template, opt.Manifest = data, *m
	return nil
}
