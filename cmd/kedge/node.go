package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments/safetext"
	"kedge/sync/fleet/message"
)

func (a *app) verifyCommand() *cobra.Command {
	var bandwidth string
	c := &cobra.Command{
		Use:   "verify DEST",
		Short: "Compare a live release on this node with its index",
		Long: `Compares the release that DEST resolves to with what was published, reading its files, and names what differs:
missing, extra, content, mode, owner, link or type; or index, if that itself is missing or damaged. Shared paths and
mounts are left out. What the release's own commands made is compared with what they left. Changes nothing. Exit code 1
where something differs.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dest, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			rate, err := byteRate(bandwidth)
			if err != nil {
				return usageError{err}
			}
			releases := artifact.Open(dest, object.New(object.Config{}), nil)
			live, err := releases.Current()
			if errors.Is(err, artifact.ErrNoRelease) {
				return hintError{
					fmt.Errorf("%s leads to no release that kedge made: %w", dest, err),
					"only sync_strategy: release keeps what it needs to verify a tree",
				}
			}
			if err != nil {
				return err
			}
			differences, err := releases.Verify(cmd.Context(), live, rate)
			if err != nil {
				return err
			}
			if a.json {
				if err := a.printJSON(differences); err != nil {
					return err
				}
			} else {
				for _, d := range differences {
					fmt.Fprintf(a.stdout, "%-8s %s\n", d.What, message.Clean(d.Path))
				}
			}
			if len(differences) > 0 {
				return fmt.Errorf("%s differs from %s in %s", dest, live.Pointer, count(len(differences), "path"))
			}
			fmt.Fprintf(a.stderr, "%s is %s, as published\n", dest, safetext.URLs(live.Pointer.String()))
			return nil
		},
	}
	c.Flags().
		StringVar(&bandwidth, "max-bandwidth", "", "read no faster than this, as in 50MB/s (default: as fast as it can)")
	a.jsonFlag(c, "the differences")
	return c
}
