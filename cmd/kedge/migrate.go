package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/durable"
	"kedge/sync/migrate"
)

// checkManifests prints where a node would treat the named manifests differently from stretcher.
// With archives it reads their archives, too. With fix it adapts the manifests to kedge, apart from
// those that every node would refuse. It returns an error if every node would refuse one of the
// manifests.
func (a *app) checkManifests(ctx context.Context, names []string, archives, fix bool) error {
	log, err := a.logger()
	if err != nil {
		return err
	}
	objects := object.New(object.Config{Log: log})
	var sources []migrate.Source
	for _, name := range names {
		found, err := migrate.Find(ctx, objects, name, a.stdin)
		if err != nil {
			return err
		}
		sources = append(sources, found...)
	}
	look := objects
	if !archives {
		look = nil
	}
	notes, refused := []deployments.Problem{}, deployments.Problems{}
	var last *migrate.Inspection // of the last source
	for _, s := range sources {
		in, err := migrate.Inspect(ctx, look, s)
		if err != nil {
			return err
		}
		last = &in
		notes, refused = append(notes, in.Notes...), append(refused, in.Refused...)
		if fix && len(in.Refused) == 0 {
			if err := a.fixManifest(ctx, objects, in, len(sources) == 1); err != nil {
				return err
			}
		}
		if a.json || fix && len(sources) == 1 {
			continue
		}
		for _, p := range in.Notes {
			a.printProblem(p)
		}
	}
	switch {
	case len(refused) > 0 && len(sources) == 1:
		return a.printProblems(refused, "in "+sources[0].Name+": no node would take it")
	case len(refused) > 0:
		return a.printProblems(refused,
			fmt.Sprintf("in some of %s: no node would take a manifest that has a problem", count(len(sources), "manifest")))
	case a.json:
		return a.printJSON(notes)
	case len(sources) == 1:
		fmt.Fprintf(a.stderr, "%s: valid, %s%s\n", sources[0].Name, count(len(notes), "trap"), archiveText(last.Archive))
	default:
		fmt.Fprintf(a.stderr, "%s, all valid, %s\n", count(len(sources), "manifest"), count(len(notes), "trap"))
	}
	return nil
}

func archiveText(found *migrate.Archive) string {
	if found == nil {
		return ""
	}
	return fmt.Sprintf("; its archive holds %s of %s", count(found.Files, "file"), bytesText(found.Bytes))
}

// fixManifest adapts a manifest to kedge: a file in place, any other manifest to standard output. alone is set if the
// manifest is the only one given. Only then may it go to standard output.
func (a *app) fixManifest(ctx context.Context, objects *object.Client, in migrate.Inspection, alone bool) error {
	isFile := in.Source.Name != "-" && !strings.Contains(in.Source.Name, "://")
	if !isFile && !alone {
		return usagef(
			"--fix can't change %s in place: give it files, or this manifest alone, whose result goes to standard output; "+
				"for a whole prefix: kedge import --fix",
			in.Source.Name,
		)
	}
	if !isFile && a.json {
		return usagef("--fix writes the changed %s to standard output, where --json prints the problems: "+
			"leave out --json, or give a file", in.Source.Name)
	}
	text, changed, err := migrate.Fix(ctx, objects, in)
	if err != nil {
		return err
	}
	for _, c := range changed {
		a.printMessage("%s: %s", in.Source.Name, c)
	}
	if !isFile {
		_, err := a.stdout.Write(text)
		return err
	}
	if len(changed) == 0 {
		return nil
	}
	info, err := os.Stat(in.Source.Name)
	if err != nil {
		return err
	}
	return durable.WriteFile(in.Source.Name, text, info.Mode().Perm())
}

// namingFlags adds the flags that say how to derive a unit from a manifest's name.
func namingFlags(f *pflag.FlagSet, n *migrate.Naming) {
	f.StringArrayVar(
		&n.Patterns,
		"match",
		nil,
		"`pattern` of manifests' names, with {stage}, {role}, {unit} and *; may be repeated (default "+
			strings.Join(migrate.DefaultPatterns, ", ")+")",
	)
	f.StringVar(
		&n.Stage,
		"stage",
		"",
		"the stage, where a manifest's name has none; where it has one, only manifests of this stage are taken",
	)
	f.StringVar(
		&n.Role,
		"role",
		"",
		"the role, where a manifest's name has none; where it has one, only manifests of this role are taken",
	)
	f.StringVar(
		&n.Unit,
		"unit",
		"",
		"the unit's name, where a manifest's name has none (default "+migrate.DefaultUnit+
			"); where it has one, only manifests of this unit are taken",
	)
}

func (a *app) importCommand() *cobra.Command {
	o := migrate.ImportOptions{}
	c := &cobra.Command{
		Use:   "import PREFIX --repo DIR",
		Short: "Bring stretcher's manifests into a deployments repo",
		Long: `Reads the manifests below PREFIX, copies the newest of each unit to a key that holds its digest, and so never changes, and writes
the unit's file in the deployments repo at DIR: STAGE/ROLE/UNIT.yaml. A file that is there keeps all but its release.

  kedge import s3://acme-deploy/manifests/ --repo ~/deployments

Which unit a manifest is for is told by its name. manifest_web_prod.yml, as capistrano-stretcher calls it, is prod/web/app; others:

  kedge import s3://acme-deploy/ --repo . --match 'deploy-{role}-*.yml' --stage prod

Nothing that stretcher reads is changed. It does nothing that is done already: run it again after each deployment, until the fleet has
gone over. The archives stay where they are. Commit what it wrote, and push.

Exit code 1 where a manifest is one that no node would take.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.Repo == "" {
				return usagef("--repo is missing: the directory of the deployments repo")
			}
			if info, err := os.Stat(o.Repo); err != nil || !info.IsDir() {
				return errors.Join(err, usagef("--repo %s: want a directory", o.Repo))
			}
			log, err := a.logger()
			if err != nil {
				return err
			}
			o.Prefix, o.Objects = args[0], object.New(object.Config{Log: log})
			done, unmatched, err := migrate.Import(cmd.Context(), o)
			if a.json {
				all := Imports{Units: append([]migrate.Imported{}, done...), PassedOver: append([]string{}, unmatched...)}
				if err := errors.Join(err, a.printJSON(all)); err != nil {
					return err
				}
			}
			refused := deployments.Problems{}
			for _, one := range done {
				refused = append(refused, one.Refused...)
				if len(one.Refused) == 0 && !a.json {
					a.showImported(one)
				}
			}
			for _, url := range unmatched {
				a.printMessage("passed over, as its name gives no unit by --match, --stage, --role and --unit: %s", url)
			}
			switch {
			case err != nil:
				return err
			case len(refused) > 0 && a.json:
				return errors.New(count(len(refused), "problem"))
			case len(refused) > 0:
				return a.printProblems(refused, "in manifests that no node would take: see kedge check --manifest")
			case len(done) == 0:
				return fmt.Errorf("no manifest below %s has a name that gives a unit by --match, --stage, --role and --unit",
					o.Prefix)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&o.Repo, "repo", "", "`directory` of the deployments repo")
	f.StringVar(&o.To, "to", "", "`prefix` to copy the manifests below (default PREFIX/kedge)")
	f.BoolVar(&o.Fix, "fix", false, "adapt the copies to kedge: see kedge check --fix")
	f.BoolVar(&o.Archives, "archives", false, "also look into manifests' archives, for what nodes would refuse")
	namingFlags(f, &o.Naming)
	a.jsonFlag(c, "what became of each unit")
	return c
}

// Imports is the JSON of kedge import.
type Imports struct {
	Units []migrate.Imported `json:"units"`
	// PassedOver are the URLs of manifests whose names belong to no unit.
	PassedOver []string `json:"passed_over"`
}

func (a *app) showImported(one migrate.Imported) {
	for _, n := range one.Notes {
		a.printProblem(n)
	}
	for _, c := range one.Fixed {
		fmt.Fprintf(a.stdout, "%s: %s\n", one.From, c)
	}
	did := "unchanged"
	if one.Written {
		did = "written"
	}
	older := ""
	if one.OlderCount > 0 {
		older = fmt.Sprintf(", the newest of %d", one.OlderCount+1)
	}
	fmt.Fprintf(a.stdout, "%s %s: %s%s\n  %s\n", one.File, did, one.From, older, one.Pointer)
}

func (a *app) bridgeCommand() *cobra.Command {
	o := migrate.BridgeOptions{}
	c := &cobra.Command{
		Use:   "bridge [URL] --to PREFIX",
		Short: "Hand stretcher's events on to agents, while moving to kedge",
		Long: `Reads what stretcher reads, a manifest's URL or Consul events, and has agents follow it. The manifest is copied
below --to, to a key that never changes. Its pointer becomes the unit's record or, where a mirror runs, a pin.
So old deploy scripts go on working while nodes change one by one. It runs on one machine, or on several:

  consul watch -type event -name deploy_web_prod \
      kedge bridge --to s3://acme-deploy/kedge --stage prod --role web

Whoever may fire such events chooses what the bridge copies and names.` +
			` With --sources it copies manifests from these prefixes alone.
From its own machine (files, and http:// there) it copies only what --sources names.

Which unit it is for is told by --stage, --role and --unit, or by the manifest's name: see kedge import.
A pin that an operator has set is not replaced.

Exit code 0 when it is handed on, or when there is no event. Run by consul watch (CONSUL_INDEX is set),
it logs a failure and exits 0.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.To == "" {
				return usagef("--to is missing: the prefix to copy manifests below, as in s3://acme-deploy/kedge")
			}
			log, err := a.logger()
			if err != nil {
				return err
			}
			err = a.bridge(cmd.Context(), o, args)
			if err != nil && startedByConsulWatch() {
				log.Error("the event is not handed on; the exit code is 0, so that consul watch goes on", "error", err)
				return nil
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&o.To, "to", "", "`prefix` to copy manifests below")
	f.StringSliceVar(&o.Bounds.Sources, "sources", nil,
		"URL `prefixes` that events' manifests may come from (default: any but http:// and this machine's own)")
	namingFlags(f, &o.Naming)
	return c
}

func (a *app) bridge(ctx context.Context, o migrate.BridgeOptions, args []string) error {
	log, err := a.logger()
	if err != nil {
		return err
	}
	if len(args) == 1 {
		o.URL = args[0]
	} else if o.URL, err = readEvent(ctx, a.stdin, log); err != nil {
		return err
	}
	if o.URL == "" {
		log.Info("no event: nothing to do")
		return nil
	}
	o.Bounds.NoLocal = len(args) == 0 // with an argument, a person names the URL
	o.Objects = object.New(object.Config{
		Sources: o.Bounds.Sources, NoLocal: o.Bounds.NoLocal, Redirect: o.Bounds.CheckSource, Log: log,
	})
	if o.Store, err = a.open(log); err != nil {
		return err
	}
	defer o.Store.Close()
	b, err := migrate.Bridge(ctx, o)
	if err != nil {
		return err
	}
	as := map[bool]string{true: "pin", false: "record"}[b.Pinned]
	says := "the unit follows the event's release"
	if !b.Changed {
		says = "the unit follows the event's release already"
	}
	log.Info(says, "unit", b.Unit.String(), "release", b.Pointer.String(), "as", as, "changed", b.Changed)
	return nil
}
