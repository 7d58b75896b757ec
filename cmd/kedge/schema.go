package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"kedge/deployments"
)

func (a *app) schemaCommand() *cobra.Command {
	kinds := deployments.SchemaKinds()
	return &cobra.Command{
		Use:   "schema [KIND]",
		Short: "The JSON Schema of a file, or of what --json prints",
		Long: `Prints a JSON Schema (draft 2020-12), for editors, Renovate and programs. Without KIND it lists the kinds.

manifest, unit, kedge.yaml and agent.yaml are what people write: an editor that speaks YAML completes and checks them.
The others are what commands print with --json: status is that of kedge status. Orders, pins and rollbacks print
an order.

  kedge schema unit > .kedge-unit.json
  sed -i '1i # yaml-language-server: $schema=../../.kedge-unit.json' \
      prod/web/app.yaml

A schema knows the shape alone; more is found by kedge check.

A program should pass over fields that it does not know, as later versions add some. Lists are never null.`,
		Args:      cobra.MaximumNArgs(1),
		ValidArgs: kinds,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				for _, kind := range kinds {
					var schema struct{ Title string }
					text, _ := deployments.Schema(kind)
					if err := json.Unmarshal(text, &schema); err != nil {
						return fmt.Errorf("the schema of %s: %w", kind, err)
					}
					fmt.Fprintf(a.stdout, "%-10s  %s\n", kind, schema.Title)
				}
				return nil
			}
			text, ok := deployments.Schema(args[0])
			if !ok {
				return usagef("%q: want one of %s", args[0], strings.Join(kinds, ", "))
			}
			_, err := a.stdout.Write(text)
			return err
		},
	}
}
