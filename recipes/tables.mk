# The paper's Tables 1 to 20, one line per setting: TABLE:RECIPE:REGIMES:VARIANTS:CRITERION:PUBLISHED
#   REGIMES    main (three), all (seven) or scaled (two), the lists below
#   VARIANTS   joined by +; plain is the recipe as it is, any other has its flags below
#   CRITERION  what exits are chosen by; none: the program's default for the task
#   PUBLISHED  the table of the paper that has the numbers with all budgets (2 to 5 repeat others')
main   = disjoint joint mixed
all    = $(main) branch-wise separate alternating mixed-gradual
scaled = joint mixed

heads      = plain+2L-1024+2L-2048
placements = plain+every-2+every-3+every-4+every-5+dense-sparse+sparse-dense
weightings = plain+GE+Inc.+Dec.+SDN

settings = \
 1:cifar100-resnet34:main:plain::8 \
 1:cifar100-msdnet:main:plain::9 \
 1:cifar100-vit-t:main:plain::10 \
 1:tinyimagenet-resnet50:main:plain::11 \
 1:imagenet-vit-t:main:plain::12 \
 1:imagenet-vit-s:main:plain::1 \
 2:20newsgroups-bert:main:plain::13 \
 2:stsb-bert:main:plain::14 \
 3:cifar100-vit-t:main:plain:patience:15 \
 3:cifar100-vit-t:main:gpf::16 \
 3:cifar100-vit-t:main:plain:entropy:17 \
 4:cifar100-vit-b:main:plain::18 \
 5:tinyimagenet-resnet50:scaled:$(weightings)::19 \
 6:tinyimagenet-vit-t:main:$(heads)::6 \
 7:tinyimagenet-resnet50:main:$(placements)::7 \
 8:cifar100-resnet34:all:plain::8 \
 9:cifar100-msdnet:all:plain::9 \
 10:cifar100-vit-t:all:plain::10 \
 11:tinyimagenet-resnet50:main:plain::11 \
 12:imagenet-vit-t:main:plain::12 \
 13:20newsgroups-bert:all:plain::13 \
 14:stsb-bert:all:plain::14 \
 15:cifar100-vit-t:main:plain:patience:15 \
 16:cifar100-vit-t:main:gpf::16 \
 17:cifar100-vit-t:main:plain:entropy:17 \
 18:cifar100-vit-b:main:plain::18 \
 19:tinyimagenet-resnet50:scaled:$(weightings)::19 \
 20:imagenette-vit-t:main:$(heads)::20

# what a variant sets beside its recipe
flags-plain   =
flags-gpf     = --set exits.head=gpf-512
flags-2L-1024 = --set exits.head=mlp-1024
flags-2L-2048 = --set exits.head=mlp-2048
flags-GE      = --set loss_weights=equilibrium
flags-Inc.    = --set loss_weights=increasing
flags-Dec.    = --set loss_weights=decreasing
flags-SDN     = --set loss_weights=sdn-ramp
$(foreach scheme,every-2 every-3 every-4 every-5 dense-sparse sparse-dense,\
  $(eval flags-$(scheme) = --set exits.placement=$(scheme)))

# what the paper's table calls the plain variant, where it names variants
plain-6  = 1L
plain-7  = every-1
plain-20 = 1L

# the columns, where they are not 25,50,75,100
budgets-cifar100-vit-b = 35,50,75,100
