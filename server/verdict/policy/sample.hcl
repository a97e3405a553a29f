# A scan policy, every key of it. A key that is commented out shows its default, or an example where
# there is none. Lengths of time are written with their unit: "90s", "15m", "24h", "90d".
#
# An entry asks for it with the selector scan:policy:prod. That selector is the gate: a workload has it
# while the image it runs is allowed, and loses it, and the identity behind it, in the same moment as the
# verdict changes.

scan_policy "prod" {
  # "enforce"; "audit", in which the gate is open and what would have happened is logged and counted; or
  # "off", in which nothing is judged and the gate is open. A policy that is not in this file has no gate
  # at all: entries that ask for it stay closed.
  #mode = "enforce"

  # The trust policies whose reports count. What they find is put together, the worst wins, and a report
  # is replaced only by a later one of the same source.
  sources = ["ci-trivy", "registry"]

  # How many of them must have a fresh and sound report for an image to pass.
  #min_sources = 1

  # Count reports, by the name of their source, that no trust policy vouches for. For a desk, never for
  # what matters.
  #allow_unsigned = false

  # How old a report may be, and the vulnerability database behind it. The age is that of the earliest of:
  # what the report says, what its signature proves, when it came.
  #max_age    = "24h"
  #max_db_age = "48h"

  # Refuse to be cleared by reports that do not say how old their database is. Trivy's do not.
  #require_db_time = false

  # How old the KEV and EPSS feeds may be and still say that a vulnerability is not in them.
  #feed_max_age = "72h"

  # What fails an image: any finding that fits one of these blocks. Within a block everything must hold.
  # Without any block it is fail { severity = "critical" }.
  fail {
    # This severity or a worse one: "critical", "high", "medium", "low", "negligible".
    severity = "critical"
  }
  fail {
    severity = "high"
    # Only if a fix is known. One that appears later turns a pass into a fail.
    only_fixed = true
  }
  #fail {
    # Known to be exploited.
    #kev = true
  #}
  #fail {
    # At least so likely to be exploited within 30 days.
    #epss = 0.5
  #}

  # What a finding counts as whose severity nobody knows.
  #unknown_as = "high"

  # What holds where no report can clear the image, where those that could are too old, and where what
  # there is cannot be relied on (filtered, no packages, from the future): "deny", "allow", or "allow"
  # for a while: from when the image was first seen to run, when the evidence became too old, when the
  # first bad report came.
  on_missing = "grace:15m"
  on_stale   = "grace:12h"
  #on_error  = "deny"

  # How long a finding of a severity may break a rule, from when it was first seen in the image. New
  # reports do not start the time anew. A severity without a block has no grace, and a worse one may not
  # have a longer grace than a lesser one.
  grace {
    severity = "high"
    for      = "72h"
  }

  # Whose VEX statements take findings off. Without the block nobody's do.
  #vex {
    #trust  = ["security-team"]
    #accept = ["not_affected", "fixed"]

    # Refuse not_affected without a justification.
    #require_justification = true

    # How long a statement counts.
    #max_age = "90d"

    # Accept statements that name a package but no image, for every image.
    #any_image = false
  #}

  # Leave out what the scanner itself was told to leave out (.trivyignore, Grype's ignore rules).
  #trust_scanner_suppressions = false

  # Let a report clear an image in which it found no packages, or no operating system it knows: images
  # from scratch.
  #allow_empty = false

  # Count reports about an index that leads to the image and state its platform.
  #allow_index_match = false

  # How an identity goes: "withdraw"; "quarantine", for clients that go on with what they had, as
  # go-spiffe's X509Source does: they get the identity of an entry that asks for
  # scan:status:prod:fail; or "withdraw+revoke", which also lists its certificates in the CRL.
  #on_fail = "withdraw"

  # Hold back, and alert, when more than this part of the workloads would lose their identity within the
  # window, until an operator admits it. Withdrawals from few workloads are never held back. Without the
  # block nothing is.
  #blast_guard {
    #max_fraction  = 0.2
    #window        = "5m"
    #min_workloads = 10
  #}

  # How long identities behind the gate live at most: so long does one last that could not be taken back.
  #svid_ttl_max = "10m"
  #jwt_ttl_max  = "2m"

  # How long an operator's exception counts at most.
  #exception_max_age = "90d"

  # The thresholds for which scan:epss-below is said.
  #epss_below = [0.1, 0.5]
}
